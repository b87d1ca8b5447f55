import os

from jsonargparse import Namespace

from lightning_n2uq.cli.run_files import ROOT, place_files


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
