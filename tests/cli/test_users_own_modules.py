"""`n2uq` with a LightningModule that lies in the current folder and knows nothing of this package."""

import sys
from pathlib import Path

import pytest
from users_modules import CONFIG, SOURCE

from lightning_n2uq.cli import main


@pytest.fixture
def own(in_empty_folder, monkeypatch):
    Path("users_own.py").write_text(SOURCE)
    Path("own.yaml").write_text(CONFIG)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "users_own", raising=False)
    yield in_empty_folder
    for name in ("users_own", "users_bad"):
        sys.modules.pop(name, None)


def refused(arguments, capsys):
    assert main(arguments) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("n2uq: error:")]
    return line


@pytest.mark.integration
def test_it_is_quantized_trained_tested_and_resumed(own, capsys):
    assert main(["fit", "--config", "own.yaml"]) == 0
    out = capsys.readouterr()
    assert "val_loss (best)" in out.out
    assert "net.2" in out.err + out.out
    (folder,) = (path for path in Path("runs").glob("own/*") if path.is_dir())
    assert {"best.ckpt", "last.ckpt", "config.yaml"} <= {path.name for path in folder.iterdir()}
    assert main(["test", "--ckpt_path", str(folder / "best.ckpt")]) == 0
    assert "test/loss" in capsys.readouterr().out
    assert main(["fit", "--config", "own.yaml", "--trainer.max_epochs", "3", "--resume", "auto"]) == 0
    assert "val_loss (best)" in capsys.readouterr().out
    export = ["export", "--ckpt", str(folder / "best.ckpt"), "-o", "x.onnx"]
    assert main([*export, "--verify", "run", "--verify-images", "3"]) == 0
    out = capsys.readouterr().out
    assert "integer arithmetic: 1 layers" in out
    assert "batch size any" in out
    assert "parity over 48 examples: all differences are codes at thresholds and roundings" in out
    assert "verify: got 'digits'" in refused([*export, "--verify", "digits"], capsys)
    assert "format: got format pt2" in refused([*export, "--format", "pt2", "-o", "x.pt2"], capsys)
    (folder / "config.yaml").unlink()
    assert "needs the run's config.yaml beside it" in refused(export, capsys)


def test_summary_shows_its_layers_as_quantized(own, capsys):
    assert main(["summary", "--config", "own.yaml"]) == 0
    out = capsys.readouterr().out
    assert "1 quantized, 2 excluded" in out
    assert "first layer by execution" in out
    assert [line.split()[1:3] for line in out.splitlines() if line.startswith("net.2 ")][-1] == ["n2uq", "2"]


@pytest.mark.integration
def test_links_reach_models_that_take_the_argument(own, capsys):
    short = ["--trainer.fast_dev_run", "true"]
    assert main(["fit", "--config", "own.yaml", "--model", "users_own.Sized", *short]) == 0
    assert "classes 3" in capsys.readouterr().out
    with_data = ["--data", "users_own.ClassData"]
    assert main(["fit", "--config", "own.yaml", "--model", "users_own.Sized", *with_data, *short]) == 0
    assert "classes 7" in capsys.readouterr().out
    assert main(["fit", "--config", "own.yaml", *with_data, *short]) == 0


def test_errors_of_the_users_own_code_are_shown_as_they_are(own, capsys):
    line = refused(["fit", "--config", "own.yaml", "--model", "users_own.Broken"], capsys)
    assert "AttributeError: 'Broken' object has no attribute 'missing'" in line
    number = SOURCE.splitlines().index("        self.missing.append(3)") + 1
    assert f"(users_own.py:{number} in __init__)" in line
    Path("users_bad.py").write_text("import math\nimport no_such_package\n")
    line = refused(["fit", "--config", "own.yaml", "--model", "users_bad.Model"], capsys)
    assert "model: cannot import 'users_bad' (ModuleNotFoundError: No module named 'no_such_package'" in line
    assert "users_bad.py:2" in line
    line = refused(["fit", "--config", "own.yaml", "--model", "users_own.Regresor"], capsys)
    assert "model: got 'users_own.Regresor', allowed are Regressor, Sized, Broken, Data, ClassData" in line
    line = refused(["summary", "--config", "own.yaml", "--model", "nowhere_at_all.X"], capsys)
    assert "there is no module 'nowhere_at_all' in the current folder or installed" in line


def test_a_monitor_that_somebody_chose_is_refused_before_training(own, capsys):
    line = refused(["fit", "--config", "own.yaml", "--checkpoint.monitor", "val/los"], capsys)
    assert "BestAndLastModelCheckpoint.monitor: got 'val/los'" in line
    assert "val_loss" in line


def test_errors_of_the_users_callbacks_are_shown_as_they_are(own, capsys):
    Path("users_bad.py").write_text("import math\nimport no_such_package\n")
    line = refused(["fit", "--config", "own.yaml", "--trainer.callbacks+=users_bad.Watch"], capsys)
    assert "trainer.callbacks: cannot import 'users_bad' (ModuleNotFoundError: No module named" in line
    assert "users_bad.py:2" in line
    Path("users_calls.py").write_text(
        "from lightning.pytorch import Callback\n\nclass Watch(Callback):\n"
        "    def __init__(self):\n        raise RuntimeError('no luck')\n"
    )
    line = refused(["fit", "--config", "own.yaml", "--trainer.callbacks+=users_calls.Watch"], capsys)
    assert "RuntimeError: no luck (users_calls.py:5 in __init__)" in line
    line = refused(["fit", "--config", "own.yaml", "--trainer.callbacks+=users_calls.Wach"], capsys)
    assert "trainer.callbacks: got 'users_calls.Wach', allowed are Watch in users_calls" in line
    sys.modules.pop("users_calls", None)
