"""Files written by revision 0514abc are loaded, tested, resumed and exported, with the results of then."""

import csv
import json
import os
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch

import runs
import warm
from lightning_n2uq.cli import main
from lightning_n2uq.interop import load_official_checkpoint
from lightning_n2uq.modules import QuantizedClassifier

BEFORE = Path(__file__).parents[1] / "data" / "revision_0514abc"
PLAIN = (  # read no config
    "test_the_published_format_of_then_is_read_and_is_still_written",
    "test_an_exported_network_is_read_and_is_still_written",
)
LOSS = {"run": 2.376241445541382, "converted": 2.2308239936828613}  # of `n2uq test`


@pytest.fixture
def folder(tmp_path, monkeypatch, request):
    by_config = request.function.__name__ not in PLAIN
    if by_config and metadata.version("lightning").startswith("2.5."):
        pytest.skip("the configs were written by Lightning 2.6, whose Trainer has an argument more")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name in ("N2UQ_RUN_DIR", "N2UQ_RESUME_FROM"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


def started(name, run):
    """A copy of an interrupted run in its place, and the arguments that go on with it."""
    place = Path("runs", run, "then")
    shutil.copytree(BEFORE / name, place)
    shutil.copy(place / "config.yaml", "config.yaml")
    return place, ["fit", "--config", "config.yaml", "--resume", "auto"]


def check_weights(path, name):
    """On another machine sums are rounded otherwise: a few steps later the weights still agree closely."""
    found = torch.load(path, weights_only=True)["state_dict"]
    expected = json.loads((BEFORE / "expected.json").read_text())[name]
    assert found.keys() == expected.keys()
    for key, numbers in expected.items():
        value = found[key].double()
        assert [float(value.sum()), float(value.norm())] == pytest.approx(numbers, rel=1e-3, abs=1e-3), key


@pytest.mark.integration
@pytest.mark.parametrize("name", ["run", "converted"])
def test_a_checkpoint_gives_the_loss_of_then(name, folder, capsys):
    if name == "converted":
        pytest.importorskip("timm")
    assert main(["test", "--ckpt_path", str(BEFORE / name / "best.ckpt")]) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("test/"))
    assert float(shown["test/loss"]) == pytest.approx(LOSS[name], abs=2e-4)


def test_a_checkpoint_predicts_what_it_predicted(folder):
    few = ["--trainer.limit_predict_batches", "1"]
    assert main(["predict", "--ckpt_path", str(BEFORE / "run" / "best.ckpt"), *few]) == 0
    tables = []
    for path in (next(folder.rglob("predictions.csv")), BEFORE / "run" / "predictions.csv"):
        with path.open() as file:
            tables.append([[float(value) for value in row] for row in list(csv.reader(file))[1:]])
    assert len(tables[0]) == 16
    for found, expected in zip(*tables, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.integration
def test_a_run_interrupted_in_an_epoch_ends_with_the_weights_of_then(folder):
    place, arguments = started("interrupted", "tiny")
    before = runs.rows(place)
    assert main(arguments) == 0
    check_weights(place / "last.ckpt", "interrupted")
    after = runs.rows(place)
    assert after[: len(before)] == before
    mark = after[len(before)]
    assert (mark["resume/batch"], mark["epoch"], mark["step"]) == ("2", "1", "6")
    assert [row["step"] for row in after[len(before) + 1 :] if "val/loss" in row] == ["7"]
    assert len(after) == len({json.dumps(row) for row in after})
    steps = [line["step"] for line in runs.snapshots(place)]
    assert steps == sorted(set(steps))


@pytest.mark.integration
def test_two_ranks_go_on_with_their_residuals(folder):
    place, arguments = started("two_ranks", "tiny+more")
    done = warm.n2uq(*arguments, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    check_weights(place / "last.ckpt", "two_ranks")


def test_the_published_format_of_then_is_read_and_is_still_written(folder):
    model = QuantizedClassifier.from_checkpoint(str(BEFORE / "run" / "best.ckpt")).eval()
    images = torch.rand(4, 1, 8, 8)
    expected = model(images)
    assert main(["convert", str(BEFORE / "run" / "best.ckpt"), "published.pth.tar"]) == 0
    found, then = (
        torch.load(path, weights_only=True)["state_dict"]
        for path in (folder / "published.pth.tar", BEFORE / "published.pth.tar")
    )
    assert found.keys() == then.keys()
    assert all(torch.equal(value, then[key]) for key, value in found.items())
    torch.manual_seed(1)
    for parameter in model.backbone.parameters():
        torch.nn.init.uniform_(parameter)
    load_official_checkpoint(str(BEFORE / "published.pth.tar"), model.backbone)
    torch.testing.assert_close(model(images), expected)


def test_an_exported_network_is_read_and_is_still_written(folder):
    load_file = pytest.importorskip("safetensors.torch").load_file
    arguments = ["--ckpt", str(BEFORE / "run" / "best.ckpt"), "--format", "safetensors"]
    assert main(["export", *arguments, "-o", "now.safetensors"]) == 0
    then, now = load_file(BEFORE / "network.safetensors"), load_file("now.safetensors")
    assert then.keys() == now.keys()
    assert [key for key, value in then.items() if not torch.equal(value, now[key])] == []
