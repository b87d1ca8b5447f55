"""Short forms of arguments, switches that turn parts off, and what a run shows while it trains."""

import os

import pytest
import yaml
from jsonargparse import Namespace
from small_run import SMALL

from lightning_n2uq.cli import main
from lightning_n2uq.cli.errors import one_line
from lightning_n2uq.cli.failures import impossible
from lightning_n2uq.cli.progress import RunProgressBar
from lightning_n2uq.cli.run_files import ROOT, place_files
from lightning_n2uq.cli.shorthands import long_names, spelled_out

SHORT = [*SMALL, "--trainer.max_epochs", "1", "--trainer.limit_val_batches", "1", "--wandb", "disabled"]


def test_names_that_mean_the_same():
    assert long_names(["--ckpt", "a", "--ckpt=b", "--ckpt_path", "c"]) == [
        "--ckpt_path", "a", "--ckpt_path=b", "--ckpt_path", "c",
    ]  # fmt: skip
    off = ["--trainer.enable_checkpointing", "false"]
    assert long_names(["--checkpoint", "null", "--checkpoint=false", "--checkpoint.save_last", "true"]) == [
        *off, *off, "--checkpoint.save_last", "true",
    ]  # fmt: skip


def test_a_named_strategy_takes_arguments():
    flag = "--trainer.strategy"
    assert spelled_out([flag, "nuqsgd_3bit", f"{flag}.bits", "4"], []) == [
        flag, "NUQSGDStrategy", f"{flag}.norm", "linf", f"{flag}.bucket_size", "256", f"{flag}.bits", "4",
    ]  # fmt: skip
    assert spelled_out([f"{flag}=ddp_powersgd", f"{flag}.init_args.x=1"], [])[:4] == [
        flag, "TorchHookStrategy", f"{flag}.hook", "powersgd",
    ]  # fmt: skip
    for plain in ([flag, "nuqsgd"], [flag, "DDPStrategy", f"{flag}.timeout", "1"], []):
        assert spelled_out(plain, []) == plain


def test_a_strategy_named_in_a_config_takes_arguments_of_the_command(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("trainer: {strategy: nuqsgd}\n")
    assert spelled_out(["--trainer.strategy.bits", "2"], [str(path)]) == [
        "--trainer.strategy", "NUQSGDStrategy", "--trainer.strategy.bits", "2",
    ]  # fmt: skip


def test_the_parser_takes_what_is_spelled_out(in_empty_folder, capsys):
    words = ["--trainer.strategy", "nuqsgd", "--trainer.strategy.bits", "2", "--trainer.logger", "CSVLogger"]
    assert main(["fit", *SMALL, *words, "--print_config"]) == 0
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert trainer["strategy"]["class_path"].endswith("NUQSGDStrategy")
    assert trainer["strategy"]["init_args"]["bits"] == 2
    assert trainer["logger"]["init_args"]["save_dir"] == "runs"


def test_a_mistyped_strategy_names_ours_first(in_empty_folder, capsys):
    assert main(["fit", *SHORT, "--trainer.strategy", "nuqsg"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "trainer.strategy: got 'nuqsg', did you mean 'nuqsgd'? allowed are nuqsgd, nuqsgd_2bit," in line
    assert "ddp_powersgd" in line


@pytest.mark.integration
def test_barebones_trains_and_leaves_no_checkpoint(in_empty_folder, capsys):
    assert main(["fit", *SMALL, "--trainer.max_epochs", "1", "--trainer.barebones", "true"]) == 0, (
        capsys.readouterr()
    )
    assert not [*in_empty_folder.rglob("*.ckpt"), *in_empty_folder.rglob("metrics.csv")]


@pytest.mark.integration
def test_no_checkpoints_are_asked_for_by_null(in_empty_folder, capsys):
    assert main(["fit", *SHORT, "--checkpoint", "null"]) == 0, capsys.readouterr()
    assert not [*in_empty_folder.rglob("*.ckpt")]
    assert [*in_empty_folder.rglob("metrics.csv")]


class UsageError(Exception):
    """Has the name of W&B's own."""


def test_loggers_that_cannot_start_say_what_helps():
    login = UsageError("No API key configured. Use `wandb login` to log in.")
    assert one_line(impossible("these values", login)).startswith("wandb: nobody is logged in")
    absent = ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available.")
    assert "pip install tensorboard" in one_line(impossible("these values", absent))


def test_an_evaluation_goes_into_its_runs_run_of_wandb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / ROOT / "name" / "time"
    (run / "wandb" / "offline-run-20250101_000000-abcd1234").mkdir(parents=True)
    arguments = Namespace(save_dir=".", offline=True, name=None, id=None, version=None)
    wandb = Namespace(class_path="lightning.pytorch.loggers.WandbLogger", init_args=arguments)
    trainer = Namespace(default_root_dir=ROOT, logger=[wandb])
    config = Namespace(trainer=trainer, checkpoint=Namespace(dirpath=None))
    place_files(config, os.path.join(ROOT, "name", "time-test"), "name", None, str(run))
    (placed,) = config.trainer.logger
    assert placed.init_args.id == "abcd1234"
    assert placed.init_args.name == "name/time"
    assert placed.init_args.save_dir == str(tmp_path / ROOT / "name" / "time-test")


class FakeTrainer:
    loggers = ()
    logger = None
    checkpoint_callback = Namespace(monitor="val/acc")

    def __init__(self, **metrics):
        self.progress_bar_metrics = metrics


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        ({"train/loss": 1, "val/loss": 2, "val/acc": 3, "val/acc5": 4}, ["train/loss", "val/acc"]),
        ({"train/loss": 1}, ["train/loss"]),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, ["a", "b", "c"]),
    ],
)
def test_the_progress_bar_shows_what_matters(metrics, shown):
    assert list(RunProgressBar().get_metrics(FakeTrainer(**metrics), None)) == shown


@pytest.mark.parametrize("width", [50, 80, 120])  # 80 is taken where there is no terminal
def test_the_bar_is_one_line(width):
    import io

    from lightning.pytorch import Trainer
    from rich.console import Console

    trainer = Trainer(
        logger=False, accelerator="cpu", callbacks=[RunProgressBar()], enable_model_summary=False
    )
    bar = trainer.progress_bar_callback
    bar._init_progress(trainer)
    bar.progress.stop()
    column = bar._metric_component
    column._metrics = {"train/loss": 1.0, "val/acc": 2.0} if width >= 80 else {"val/something long": 2.0}
    trainer.state.fn = "fit"
    bar.train_progress_bar_id = bar.progress.add_task("Epoch 10/39", total=120)
    text = io.StringIO()
    Console(file=text, width=width).print(bar.progress.get_renderable())
    assert len(text.getvalue().strip().splitlines()) == 1, text.getvalue()
    whole = all(part in text.getvalue() for part in ("Epoch 10/39", "0/120", "0:00:0", "train/loss: 1.000"))
    assert whole == (width >= 80), text.getvalue()


def test_last_and_best_are_told_apart(trained):
    _, out = trained
    assert "val/acc (last) " in out
    assert "val/acc (best) " in out
    assert "v_num" not in out
