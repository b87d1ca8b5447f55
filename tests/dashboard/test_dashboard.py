import json
import re
import sys
from pathlib import Path

import pytest

from lightning_n2uq.dashboard import main
from lightning_n2uq.dashboard.panels import SECTIONS

LOGGED = """
train/acc val/acc test/acc train/loss val/loss lr-Adam/weights
quant/layer1.0.conv1/threshold_1 quant/layer1.0.conv1/smallest_width quant/layer1.0.conv1/widths_at_floor
quant/layer1.0.conv1/scale_in quant/layer1.0.conv1/scale_out quant/layer1.0.conv1/activation_clipped_low
quant/layer1.0.conv1/weight_changed quant/layer1.0.conv1/weight_entropy quant/layer1.0.conv1/weight_usage_0
quant/layer1.0.conv1/activation_entropy quant/mean_weight_entropy quant/layer1.0.conv1/weight_dead_levels
quant/layer1.0.conv1/activation_usage_3 entropy/penalty speed/steps_per_second comm/sent_bytes comm/ratio
comm/relative_error comm/nonfinite_buckets comm/encode_s
"""


def test_every_panel_matches_a_metric_that_is_logged():
    for section in SECTIONS:
        for panel in section.panels:
            assert any(re.fullmatch(panel.regex, name) for name in LOGGED.split()), panel.title


def test_the_sections_are_those_that_users_look_for():
    assert [s.title for s in SECTIONS] == ["Accuracy", "Thresholds", "Entropy", "Traffic", "Speed"]


def test_a_dry_run_writes_the_workspace_and_sends_nothing(tmp_path, capsys, monkeypatch):
    internal = pytest.importorskip("wandb_workspaces.workspaces.internal", reason="extra `dashboards`")
    monkeypatch.setattr(internal, "upsert_view2", lambda view: pytest.fail("sent"))
    path = tmp_path / "new" / "workspace.json"
    assert main(["--entity", "team", "--project", "p", "--dry-run", "--output", str(path)]) == 0
    view = json.loads(path.read_text())
    assert (view["entity"], view["project"]) == ("team", "p")
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [s.title for s in SECTIONS]
    panels = [panel["config"] for section in sections for panel in section["panels"]]
    regexes = {panel["metricRegex"] for panel in panels if "metricRegex" in panel}
    assert r"^quant/.*/threshold_\d+$" in regexes
    assert {p["xAxis"] for p in panels if "metricRegex" in p} == {"trainer/global_step"}
    assert main(["--entity", "team", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["project"] == "lightning_n2uq"


def test_pushing_sends_the_view_once(monkeypatch, capsys):
    internal = pytest.importorskip("wandb_workspaces.workspaces.internal", reason="extra `dashboards`")
    sent = []

    def upsert(view):
        sent.append(view)
        return {"upsertView": {"view": {"name": "abc", "id": "1"}}}

    monkeypatch.setattr(internal, "upsert_view2", upsert)
    workspace = sys.modules["wandb_workspaces.workspaces"].Workspace
    monkeypatch.setattr(workspace, "url", "https://wandb.ai/team/p?nw=abc")  # asks for an account otherwise
    assert main(["--entity", "team", "--project", "p"]) == 0
    assert len(sent) == 1
    assert "team/p" in capsys.readouterr().out


def test_mistakes_give_one_clear_line(monkeypatch):
    with pytest.raises(ValueError, match="output: got 'x', allowed with --dry-run only"):
        main(["--entity", "team", "--output", "x"])
    pytest.importorskip("wandb_workspaces.workspaces", reason="extra `dashboards`")
    with pytest.raises(ValueError, match="entity: got ' ', allowed is a name"):
        main(["--entity", " ", "--dry-run"])
    internal = sys.modules["wandb_workspaces.workspaces.internal"]

    def refuse(view):
        raise ValueError("permission denied\nlong explanation")

    monkeypatch.setattr(internal, "upsert_view2", refuse)
    with pytest.raises(ValueError, match=r"refused the workspace \(permission denied\); try wandb login"):
        main(["--entity", "team"])


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(ValueError, match="wandb-workspaces is not installed, install it with pip install"):
        main(["--entity", "team", "--dry-run"])


def sweep_files():
    import lightning_n2uq.configs

    return sorted(Path(lightning_n2uq.configs.__path__[0]).glob("sweeps/*.yaml"))


@pytest.mark.parametrize("path", sweep_files(), ids=lambda path: path.stem)
@pytest.mark.parametrize("choice", [0, -1])
def test_what_the_agent_runs_is_a_command_that_trains(path, choice, capsys):
    yaml = pytest.importorskip("yaml")
    from lightning_n2uq.cli import main as n2uq

    sweep = yaml.safe_load(path.read_text())
    assert {"program", "method", "metric", "parameters", "command"} <= sweep.keys()
    chosen = {n: p["values"][choice] if "values" in p else p["min"] for n, p in sweep["parameters"].items()}
    command = []
    for word in sweep["command"]:
        flags = [f"--{name}={value}" for name, value in chosen.items()]  # as the agent writes them
        command += flags if word == "${args}" else [word.replace("${program}", sweep["program"])]
    assert command[0] == "n2uq"
    assert n2uq([*command[1:], "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["seed_everything"] == chosen.pop("seed_everything")
    assert chosen.pop("config").startswith("digits/")
    for name, value in chosen.items():  # the config that came first is overridden
        assert config["model"]["init_args"][name.removeprefix("model.init_args.")] == value
