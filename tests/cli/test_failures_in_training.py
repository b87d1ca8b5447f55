"""Errors after the first step that are not the code's: one line each, whatever step the run was at."""

import errno
import os
import shutil

import pytest
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from small_run import SMALL

from lightning_n2uq.cli import main

QUIET = ["--trainer.enable_progress_bar", "false"]


def error_lines(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if "n2uq: error" in line]


@pytest.fixture
def alone(trained, in_empty_folder):
    """A checkpoint without the config of its run beside it."""
    shutil.copy(trained[0] / "last.ckpt", "alone.ckpt")
    return ["fit", *SMALL, *QUIET, "--trainer.max_epochs", "5", "--ckpt_path", "alone.ckpt"]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model.optimizer", "sgd"], ["optimizer", "'adam'", "'sgd'"]),
        (["--model.activation_quantizer", "n2uq_fixed"], ["activation_quantizer", "'n2uq'", "'n2uq_fixed'"]),
        (["--model.lr", "1e-4"], ["lr", "0.005", "0.0001"]),
    ],
)
def test_a_checkpoint_without_its_config_is_compared_by_its_own_arguments(alone, flags, named, capsys):
    assert main([*alone, *flags]) == 2
    (line,) = error_lines(capsys)
    assert [text for text in named if text not in line] == []


@pytest.mark.integration
def test_a_checkpoint_without_its_config_is_resumed(alone, capsys):
    assert main(alone) == 0


@pytest.mark.integration
def test_another_optimizer_of_an_own_module_is_named_before_the_first_step(alone, capsys, monkeypatch):
    from lightning_n2uq.modules import classifier

    build = classifier.build_optimizer
    monkeypatch.setattr(
        classifier, "build_optimizer", lambda name, groups, **keys: build("sgd", groups, **keys)
    )
    assert main(alone) == 2
    (line,) = error_lines(capsys)
    assert "optimizer: got SGD" in line
    assert "momentum" in line


@pytest.mark.integration
def test_what_cannot_be_restored_is_named_although_many_steps_are_behind(alone, capsys, monkeypatch):
    from lightning_n2uq.modules import QuantizedClassifier

    def fail(self, checkpoint):
        raise KeyError("thresholds")

    monkeypatch.setattr(QuantizedClassifier, "on_load_checkpoint", fail)
    assert main(alone) == 2
    (line,) = error_lines(capsys)
    assert "ckpt_path: cannot go on from 'alone.ckpt'" in line
    assert "thresholds" in line


@pytest.fixture
def photos(in_empty_folder):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = in_empty_folder / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(8):
                Image.new("RGB", (40, 40), (index * 9, 0, 0)).save(folder / f"{index}.png")
    return in_empty_folder / "photos"


@pytest.mark.integration
@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_image_that_breaks_after_the_first_step_is_named_in_one_line(photos, workers, capsys):
    for path in sorted((photos / "train").glob("*/*.png"))[-3:]:
        path.write_bytes(path.read_bytes()[:40])
    data = ["--data", "ImageFolderDataModule", "--data.root", str(photos), "--data.batch_size", "2"]
    loader = ["--data.num_workers", workers, "--data.image_size", "32", "--trainer.accelerator", "cpu"]
    model = ["--model", "QuantizedClassifier", "--model.backbone", "resnet20"]
    trainer = [
        "--model.backbone_args",
        "{width: 4}",
        "--trainer.max_epochs",
        "1",
        "--trainer.logger",
        "false",
    ]
    code = main(["fit", *QUIET, *data, *loader, *model, *trainer])
    assert code == 2
    (line,) = error_lines(capsys)
    assert ".png" in line
    assert "Traceback" not in line


@pytest.mark.integration
def test_a_log_on_a_full_disk_is_one_line_that_names_the_folder(in_empty_folder, capsys, monkeypatch):
    def full(self, metrics, step=None):
        if step and step > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(CSVLogger, "log_metrics", full)
    code = main(["fit", *SMALL, *QUIET, "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"])
    assert code == 2
    (line,) = error_lines(capsys)
    assert "runs/digits/n2uq_w2a2" in line
    assert "No space left on device" in line


def test_a_lost_worker_of_the_loader_is_one_line(in_empty_folder, capsys, monkeypatch):
    from lightning_n2uq.modules import QuantizedClassifier

    def step(self, batch, batch_idx):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.")

    monkeypatch.setattr(QuantizedClassifier, "training_step", step)
    assert main(["fit", *SMALL, *QUIET]) == 2
    (line,) = error_lines(capsys)
    assert "data.num_workers: a worker process of the loader is lost" in line


def test_a_broken_image_in_a_worker_is_named_outside_of_training_too(photos):
    from lightning_n2uq.cli.errors import one_line
    from lightning_n2uq.datamodules import ImageFolderDataModule

    broken = photos / "val" / "cat" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    data = ImageFolderDataModule(str(photos), image_size=32, num_workers=1, batch_size=4)
    data.setup("validate")
    with pytest.raises(ValueError, match="Caught BrokenImageError in DataLoader worker") as caught:
        list(data.val_dataloader())
    assert one_line(caught.value).startswith(f"broken image file {broken}: ")
