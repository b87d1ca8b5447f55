"""A signal outside of the training steps ends a command with the signal's exit code, never with 0."""

import os
import signal
import subprocess
import sys

import pytest

import runs

CODES = {"SIGTERM": 143, "SIGINT": 130}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("command", "hook", "name"),
    [
        ("fit", "setup", "SIGTERM"),
        ("fit", "setup", "SIGINT"),
        ("fit", "on_validation_batch_end", "SIGTERM"),  # of the sanity check
        ("test", "on_test_batch_end", "SIGTERM"),
        ("test", "on_test_batch_end", "SIGINT"),
        ("validate", "on_validation_batch_end", "SIGTERM"),
        ("predict", "on_predict_batch_end", "SIGTERM"),
    ],
)
def test_a_signal_outside_of_training_ends_with_its_code(tmp_path, command, hook, name):
    runs.write_config(tmp_path)
    done = runs.command(command, tmp_path, STOP_IN=f"{hook} {name}")
    assert done.returncode == CODES[name], done.stderr
    assert f"stopped by {name}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.integration
def test_a_signal_in_the_test_after_fit_ends_with_its_code(tmp_path):
    runs.write_config(tmp_path, max_epochs=1)
    done = runs.command("fit", tmp_path, "--test_after_fit", "true", STOP_IN="on_test_batch_end SIGTERM")
    assert done.returncode == 143, done.stderr
    (folder,) = runs.run_folders(tmp_path)
    assert (folder / "last.ckpt").is_file()


def test_a_second_ctrl_c_ends_training_at_once_with_its_own_code(tmp_path, capsys):
    from lightning.pytorch import Callback, Trainer

    from lightning_n2uq.checkpointing import ExactResume
    from lightning_n2uq.datamodules import SyntheticDataModule
    from lightning_n2uq.modules import QuantizedClassifier

    class Impatient(Callback):
        def on_before_optimizer_step(self, *_):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    small = {"num_classes": 10, "in_channels": 1, "image_size": 8}
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path, enable_progress_bar=False,
        callbacks=[ExactResume(str(tmp_path)), Impatient()], enable_model_summary=False,
        enable_checkpointing=True, limit_val_batches=0,
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        trainer.fit(QuantizedClassifier(**small, backbone_args={"width": 2}), SyntheticDataModule(**small))
    assert ended.value.code == 130
    assert "stopped by SIGINT" in capsys.readouterr().err


SWALLOWING = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background leaves it ignored
from lightning_n2uq import cli

class CCode:
    def find_spec(self, name, path=None, target=None):
        if name == "lightning_n2uq.cli.training":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            except BaseException:
                raise ImportError("cannot load module more than once per process")

sys.meta_path.insert(0, CCode())
sys.exit(cli.main(["fit"]))
"""


def test_ctrl_c_while_code_is_imported_that_swallows_it_ends_the_process():
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWING], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
