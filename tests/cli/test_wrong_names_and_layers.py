"""Wrong names of metrics, missing arguments, and configs on top of each other."""

import shutil
import warnings

import pytest
from small_run import SMALL

from lightning_n2uq.cli import main
from lightning_n2uq.cli.layers import check_layers


def error_line(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "n2uq: error" in line]
    return line


@pytest.mark.integration
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (
            ["--checkpoint.monitor", "val_loss"],
            "Checkpoint.monitor: got 'val_loss', did you mean 'val/loss'?",
        ),
        (
            ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val_acc"],
            "EarlyStopping.monitor: got 'val_acc', did you mean 'val/acc'?",
        ),
    ],
)
def test_a_metric_that_validation_does_not_log_is_named_before_training(
    flags, named, in_empty_folder, capsys, monkeypatch
):
    from lightning_n2uq.modules import QuantizedClassifier

    def step(self, batch, batch_idx):
        raise AssertionError("training began")

    monkeypatch.setattr(QuantizedClassifier, "training_step", step)
    assert main(["fit", *SMALL, *flags]) == 2
    assert named in error_line(capsys)


@pytest.mark.integration
def test_a_metric_that_nobody_logs_is_one_line_after_the_epoch(in_empty_folder, capsys):
    stop = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "train_lss"]
    assert main(["fit", *SMALL, *stop, "--trainer.max_epochs", "2"]) == 2
    assert "EarlyStopping.monitor" in error_line(capsys)


@pytest.mark.integration
def test_fewer_epochs_than_are_done_is_one_line(trained, in_empty_folder, capsys):
    shutil.copy(trained[0] / "last.ckpt", "alone.ckpt")
    assert main(["fit", *SMALL, "--ckpt_path", "alone.ckpt", "--trainer.max_epochs", "2"]) == 2
    assert "max_epochs=2" in error_line(capsys)


@pytest.mark.integration
def test_an_argument_that_a_class_lacks_is_named(in_empty_folder, capsys):
    assert main(["fit", *SMALL, "--trainer.callbacks", "GradientAccumulationScheduler"]) == 2
    assert "scheduling: missing, GradientAccumulationScheduler" in error_line(capsys)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("data: null", "data: got null in 'top.yaml', allowed is a class"),
        ("data: [DigitsDataModule]", "data: got a list (['DigitsDataModule']) in 'top.yaml'"),
        ("model: null", "model: got null in 'top.yaml'"),
        ("trainer: null", "trainer: got null in 'top.yaml', allowed is a mapping"),
        ("trainer: [1]", "trainer: got a list"),
        ("- 1", "config: 'top.yaml' holds a list"),
    ],
)
def test_a_second_config_of_another_shape_is_named(text, line, in_empty_folder, capsys):
    (in_empty_folder / "top.yaml").write_text(text)
    assert main(["fit", *SMALL, "--config", "top.yaml"]) == 2
    assert line in error_line(capsys)


def test_a_list_that_replaces_an_earlier_configs_is_said(in_empty_folder, capsys):
    one, two, more = (in_empty_folder / name for name in ("one.yaml", "two.yaml", "more.yaml"))
    one.write_text("trainer: {callbacks: [{class_path: QuantizationMonitor}]}")
    two.write_text("trainer: {callbacks: [{class_path: NonFiniteGuard}]}")
    more.write_text("trainer: {callbacks+: [{class_path: NonFiniteGuard}]}")
    with pytest.warns(UserWarning, match=r"trainer.callbacks: those of .*one.yaml.* are dropped.*two.yaml"):
        check_layers([str(one), str(two)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_layers([str(one), str(more)])
    arguments = ["fit", *SMALL, "--config", str(one), "--config", str(more), "--print_config"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "QuantizationMonitor" in shown
    assert "NonFiniteGuard" in shown
