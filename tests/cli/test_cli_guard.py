import math

import pytest
import torch

from lightning_n2uq.cli import main

# A learning rate that breaks the network within a few steps, as a mistyped exponent does.
BROKEN = [
    "fit", "--config", "digits/n2uq_w2a2", "--model.backbone_args", "{width: 4}", "--trainer.max_epochs", "1",
    "--trainer.logger", "false", "--trainer.enable_model_summary", "false", "--wandb", "disabled",
    "--model.optimizer", "sgd", "--model.lr", "1e30", "--trainer.limit_train_batches", "8",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered")
def test_a_broken_network_stops_the_run_with_one_line_by_default(in_empty_folder, capsys):
    assert main([*BROKEN, "--trainer.enable_progress_bar", "false"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "n2uq: error" in line]
    assert len(lines) == 1
    assert "NonFiniteGuard: step " in lines[0]
    assert "backbone." in lines[0]  # the layer
    assert not list(in_empty_folder.rglob("*.ckpt"))  # no broken network is kept


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:.*")
def test_the_switch_turns_it_off(in_empty_folder):
    assert main([*BROKEN, "--non_finite_guard", "false"]) == 0
    saved = torch.load(next(in_empty_folder.rglob("last.ckpt")), weights_only=True)
    total = sum(float(value.double().sum()) for value in saved["state_dict"].values())
    assert not math.isfinite(total)  # what the guard is for


def test_its_arguments_are_set_from_the_command_line(in_empty_folder, capsys):
    assert main([*BROKEN, "--guard.loss", "ignore"]) == 2
    line = capsys.readouterr().err
    assert "guard.loss: got 'ignore'" in line
    assert "stop, skip, warn, off" in line


def test_help_shows_them(capsys):
    assert main(["fit", "--help", "all"]) == 0
    text = capsys.readouterr().out
    for name in ("non_finite_guard", "guard.loss", "guard.gradient", "guard.floor", "guard.max_skips"):
        assert f"--{name}" in text
