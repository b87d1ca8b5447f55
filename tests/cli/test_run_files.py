import os

import pytest
from jsonargparse import Namespace
from small_run import SMALL

from lightning_n2uq.cli import main
from lightning_n2uq.cli.run_files import ROOT, place_files, summarize_best, wandb_id


def test_the_folder_of_wandb_does_not_depend_on_where_its_service_runs(tmp_path, monkeypatch):
    """W&B's service may have been started by an earlier run in another folder."""
    monkeypatch.chdir(tmp_path)
    wandb = Namespace(
        class_path="lightning.pytorch.loggers.WandbLogger",
        init_args=Namespace(save_dir=".", offline=True, name=None),
    )
    trainer = Namespace(default_root_dir=ROOT, logger=[wandb])
    config = Namespace(trainer=trainer, checkpoint=Namespace(dirpath=None))
    place_files(config, os.path.join(ROOT, "name", "time"), "name", None)
    (placed,) = config.trainer.logger
    assert placed.init_args.save_dir == str(tmp_path / ROOT / "name" / "time")


def test_the_newest_run_of_wandb_in_a_folder_is_the_one_to_go_on_with(tmp_path):
    assert wandb_id(str(tmp_path)) is None
    for name in ("offline-run-20250101_000000-abcd1234", "run-20250102_000000-my-own-id", "latest-run"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    assert wandb_id(str(tmp_path)) == "my-own-id"


@pytest.mark.integration
def test_a_resumed_run_goes_on_in_its_run_of_wandb(in_empty_folder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    epochs = ("--resume", "auto", "--trainer.max_epochs")
    assert main(["fit", *SMALL, *epochs, "1"]) == 0
    assert main(["fit", *SMALL, *epochs, "2"]) == 0
    folders = [path.name for path in in_empty_folder.glob("runs/digits/*/*/wandb/offline-run-*")]
    assert len(folders) == 2, folders
    assert len({name.rpartition("-")[2] for name in folders}) == 1
    assert main(["fit", *SMALL, "--trainer.max_epochs", "1"]) == 0
    folders = [path.name for path in in_empty_folder.glob("runs/digits/*/*/wandb/offline-run-*")]
    assert len({name.rpartition("-")[2] for name in folders}) == 2


class WandbLogger:
    """Stands for Lightning's, which is known by its name: importing it takes a second."""

    def __init__(self):
        self.experiment = Namespace(summary={"val/acc": 0.5})


def test_the_best_score_is_in_wandbs_summary_beside_the_last():
    logger = WandbLogger()
    trainer = Namespace(is_global_zero=True, loggers=[logger, Namespace()])
    summarize_best(trainer, Namespace(best_model_score=0.75, monitor="val/acc"))
    assert logger.experiment.summary == {"val/acc": 0.5, "best/val/acc": 0.75}
    for nothing in (None, Namespace(best_model_score=None, monitor="val/acc")):
        summarize_best(trainer, nothing)
    trainer.is_global_zero = False
    summarize_best(trainer, Namespace(best_model_score=1.0, monitor="val/acc"))
    assert logger.experiment.summary["best/val/acc"] == 0.75
