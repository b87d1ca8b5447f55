"""Strategies whose processes are forked or spawned from the command, instead of running it again."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from small_run import SMALL

from lightning_n2uq.checkpointing import AtomicCheckpointIO
from lightning_n2uq.cli import main
from lightning_n2uq.utils import compat_lightning


def test_weights_that_a_spawned_process_hands_back_are_read(tmp_path):
    path = tmp_path / compat_lightning.CHILD_WEIGHTS
    weights = {"a": torch.arange(3.0)}
    AtomicCheckpointIO().save_checkpoint(weights, path)
    assert weights.keys() == {"a"}
    read = AtomicCheckpointIO().load_checkpoint(path)
    assert read.keys() == {"a"}
    assert torch.equal(read["a"], weights["a"])


def test_what_spawned_processes_get_can_be_pickled(in_empty_folder, monkeypatch):
    from lightning_n2uq.cli.training import N2UQCLI

    seen = []
    monkeypatch.setattr(N2UQCLI, "_run_subcommand", lambda self, name: seen.append(self))
    assert main(["fit", *SMALL, "--trainer.devices", "2", "--trainer.strategy", "ddp_spawn"]) == 0
    (cli,) = seen
    sent = pickle.loads(pickle.dumps((cli.trainer, cli.model, cli.datamodule)))
    assert len(sent[0].callbacks) == len(cli.trainer.callbacks)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_two_such_ranks_train_to_their_end_and_are_tested(strategy, in_empty_folder):
    """The command that started them tests with the weights that they hand back."""
    command = [sys.executable, "-m", "lightning_n2uq", "fit", *SMALL, "--trainer.max_epochs", "1"]
    done = subprocess.run(
        [*command, "--trainer.devices", "2", "--trainer.strategy", strategy, "--test_after_fit", "true"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "test/acc" in done.stdout
    (last,) = in_empty_folder.glob("runs/digits/*/*/last.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(last)["global_step"] == 4
