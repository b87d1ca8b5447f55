"""The modules under `examples/` from YAML: quantized, trained, resumed exactly, exported, on two ranks."""

import contextlib
import importlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_n2uq.cli import main
from lightning_n2uq.convert import CalibratedInput
from lightning_n2uq.convert.record import KEY

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CLASSES = {"gan": "GAN", "regression": "Regressor", "segmentation": "UNet", "self_supervised": "Student"}
QUIET = ["--trainer.enable_model_summary", "false", "--trainer.enable_progress_bar", "false"]
SHORT = [*QUIET, "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"]
RANKS = {name: ["--trainer.devices", "2", "--trainer.strategy", "nuqsgd"] for name in CLASSES}
# A loss of one of its parts leaves the other one without gradients.
RANKS["gan"][-1:] = ["NUQSGDStrategy", "--trainer.strategy.find_unused_parameters", "true"]


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """A copy of the folder as the current one."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__", "runs"))
    monkeypatch.chdir(tmp_path / "examples")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "examples")])
    yield tmp_path / "examples"
    for name in [*CLASSES, "export"]:
        sys.modules.pop(name, None)


def fit(name, epochs, *more):
    """Trains in this process; returns the run's folder."""
    before = set(Path("runs", name).glob("*/"))
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main(["fit", "--config", f"{name}.yaml", *SHORT, "--trainer.max_epochs", str(epochs), *more])
    assert code == 0, errors.getvalue()
    new = sorted(path for path in set(Path("runs", name).glob("*/")) - before if path.is_dir())
    return new[-1] if new else None


def state(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


def test_every_example_is_a_module_with_a_config():
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(CLASSES)
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*CLASSES, "export"}
    for name, kind in CLASSES.items():
        text = (EXAMPLES / f"{name}.yaml").read_text()
        assert f"n2uq fit --config {name}.yaml" in text
        assert f"python export.py {name}.{kind} runs/{name}/TIME/" in text
        assert yaml.safe_load(text)["model"]["class_path"] == f"{name}.{kind}"
        assert "n2uq" not in (EXAMPLES / f"{name}.py").read_text()


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")  # exporters of torch and onnx tell of their own deprecations
@pytest.mark.parametrize("name", CLASSES)
def test_an_example_trains_resumes_exactly_and_is_exported(name, examples, capsys):
    whole = fit(name, 2)
    half = fit(name, 1)
    resumed = fit(name, 2, "--ckpt_path", str(half / "last.ckpt"))
    (resumed,) = (
        path for path in Path("runs", name).glob("*/") if path not in (whole, half) and path.is_dir()
    )
    wanted, found = state(whole), state(resumed)
    assert [key for key in wanted if not torch.equal(wanted[key], found[key])] == []
    assert any(not torch.equal(value, wanted[key]) for key, value in state(half).items())

    module = getattr(importlib.import_module(name), CLASSES[name]).load_from_checkpoint(whole / "last.ckpt")
    quantizers = [m for m in module.modules() if isinstance(m, CalibratedInput)]
    assert quantizers
    assert all(m.fitted for m in quantizers)

    export = importlib.import_module("export").export
    export(f"{name}.{CLASSES[name]}", str(whole / "last.ckpt"), "network.onnx")
    out = capsys.readouterr().out
    assert "unexplained" not in out.lower() or "0 unexplained" in out.lower(), out
    import onnxruntime

    session = onnxruntime.InferenceSession("network.onnx")
    example = torch.randn_like(module.example_input_array)
    (answer,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    with torch.no_grad():
        wanted = module.eval()(example)
    torch.testing.assert_close(torch.from_numpy(answer), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.integration
@pytest.mark.parametrize(
    "name", ["regression", *(pytest.param(n, marks=pytest.mark.slow) for n in CLASSES if n != "regression")]
)
def test_an_example_trains_on_two_ranks_with_compressed_gradients(name, examples):
    command = [
        sys.executable,
        "-m",
        "lightning_n2uq",
        "fit",
        "--config",
        f"{name}.yaml",
        *SHORT,
        *RANKS[name],
    ]
    command += [*RANKS[name], "--trainer.max_epochs", "1"]
    options = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True}
    done = subprocess.run(command, timeout=300, check=False, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (path for path in Path("runs", name).glob("*/") if path.is_dir())
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    assert checkpoint[KEY]["layers"]
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
