from pathlib import Path

import pytest
import yaml

import lightning_n2uq.configs
from lightning_n2uq.cli import main
from lightning_n2uq.cli.arguments import resolve_arguments
from lightning_n2uq.cli.configs import find_config, packaged_configs, run_name

FOLDER = Path(lightning_n2uq.configs.__path__[0])
# Recipes for data on disk run on made-up images in test_cli_recipe_configs; parts (a strategy, a sweep) do
# not run by themselves.
WHOLE = sorted(FOLDER.glob("digits/*.yaml"))


@pytest.mark.integration
@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_every_config_trains_one_step(path, in_empty_folder, capsys):
    code = main(["fit", "--config", str(path), "--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu"])
    assert code == 0, capsys.readouterr().err
    assert not list(in_empty_folder.iterdir())


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_every_config_says_on_top_what_it_is_and_stands_alone(path):
    text = path.read_text()
    assert text.startswith("# ")
    assert set(yaml.safe_load(text)) >= {"seed_everything", "trainer", "model", "data"}


@pytest.mark.parametrize(
    "name",
    ["digits/n2uq_w2a2", "digits/n2uq_w2a2.yaml", "configs/digits/n2uq_w2a2.yaml", "./digits/n2uq_w2a2"],
)
def test_packaged_configs_are_found_by_name(name, in_empty_folder):
    assert Path(find_config(name)).samefile(FOLDER / "digits" / "n2uq_w2a2.yaml")


def test_a_file_of_the_user_comes_first(in_empty_folder):
    mine = in_empty_folder / "digits" / "n2uq_w2a2.yaml"
    mine.parent.mkdir()
    mine.write_text("# mine\n")
    assert find_config("digits/n2uq_w2a2.yaml") == "digits/n2uq_w2a2.yaml"
    assert find_config("s3://bucket/any.yaml") == "s3://bucket/any.yaml"


def test_config_arguments_are_replaced_wherever_they_stand(in_empty_folder):
    path = find_config("digits/float")
    arguments = ["-c", "digits/float", "--model.lr", "0.1", "--config=digits/float.yaml"]
    assert resolve_arguments(arguments) == (
        ["-c", path, "--model.lr", "0.1", f"--config={path}"],
        [path, path],
    )


def test_runs_are_named_after_their_configs(tmp_path):
    first, second = find_config("digits/float"), find_config("digits/n2uq_w2a2")
    assert run_name([first]) == "digits/float"
    assert run_name([first, second]) == "digits/float+n2uq_w2a2"
    assert run_name([]) == "default"
    (tmp_path / "mine.yaml").write_text("trainer: {}\n")
    assert run_name([str(tmp_path / "mine.yaml")]) == "mine"


def test_n2uq_configs_lists_them(capsys):
    assert main(["configs"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line] == list(
        packaged_configs()
    )
    assert main(["configs", "digits/", "w3"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line] == ["digits/n2uq_w3a3"]
