"""A test set whose folders are not those of the training set: labels go by name, not by position."""

import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_n2uq.checkpointing import read_file
from lightning_n2uq.cli import main
from lightning_n2uq.datamodules import CIFAR10DataModule, ImageFolderDataModule
from lightning_n2uq.utils.class_names import saved_class_names

CLASSES = ["cat", "dog", "horse", "zebra"]


def images(root, split, classes, count, size=16):
    for name in classes:
        rng = np.random.default_rng(list(name.encode()))
        (root / split / name).mkdir(parents=True)
        colour = rng.integers(0, 256, 3)
        for number in range(count):
            pixels = np.clip(colour + rng.integers(-9, 9, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / split / name / f"{number}.png")


def command(name, root, *more):
    small = ["--model", "QuantizedClassifier", "--model.init_args.backbone_args", "{width: 4}"]
    data = ["--data", "ImageFolderDataModule", "--data.root", str(root), "--data.image_size", "16"]
    rest = ["--data.batch_size", "8", "--data.num_workers", "0", "--wandb", "disabled"]
    return main([name, *small, *data, *rest, "--trainer.enable_model_summary", "false", *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Images of four classes, and the checkpoint of a network trained on them."""
    folder = tmp_path_factory.mktemp("classes")
    images(folder / "data", "train", CLASSES, 8)
    images(folder / "data", "val", CLASSES, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert (
            command("fit", folder / "data", "--trainer.max_epochs", "2", "--model.init_args.lr", "0.01") == 0
        )
    (checkpoint,) = (folder / "runs").rglob("last.ckpt")
    return folder / "data", checkpoint


@pytest.mark.integration
def test_a_checkpoint_keeps_the_names(run):
    assert saved_class_names(read_file(str(run[1]))) == CLASSES


@pytest.mark.integration
def test_a_class_that_the_network_does_not_know_is_named(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "other", "test", ["ant", "cat", "dog", "horse"], 2)
    assert command("test", tmp_path / "other", "--ckpt_path", str(run[1])) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "test/ has the unknown class 'ant'; allowed are cat, dog, horse, zebra" in line


@pytest.mark.filterwarnings("ignore:root. the test split has no images of 'cat'")
@pytest.mark.integration
def test_a_test_set_that_lacks_a_class_is_scored_by_name(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, checkpoint = run
    assert command("predict", data, "--ckpt_path", str(checkpoint)) == 0
    (file,) = tmp_path.rglob("predictions.csv")
    with open(file, newline="") as stream:
        rows = list(csv.DictReader(stream))
    answers = [int(row["label"]) for row in rows]
    assert [row["class"] for row in rows] == [CLASSES[answer] for answer in answers]
    assert rows[0]["file"] == "val/cat/0.png"
    labels = np.repeat(np.arange(4), 4)
    kept = labels != 0
    wanted = float(np.mean(np.array(answers)[kept] == labels[kept]))
    shifted = float(np.mean(np.array(answers)[kept] == labels[kept] - 1))
    assert wanted != shifted, answers
    shutil.copytree(data / "val", tmp_path / "fewer" / "test", ignore=shutil.ignore_patterns("cat"))
    capsys.readouterr()
    assert command("test", tmp_path / "fewer", "--ckpt_path", str(checkpoint)) == 0
    scores = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("test/"))
    assert float(scores["test/acc"]) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.integration
def test_classes_that_were_given_in_another_order_are_refused(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, checkpoint = run
    order = "[dog, cat, horse, zebra]"
    assert command("validate", data, "--data.classes", order, "--ckpt_path", str(checkpoint)) == 2
    assert "class 0 of the network is 'cat', that of the data is 'dog'" in capsys.readouterr().err


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:root. the val split has no images of 'wasp'")
def test_given_classes_number_the_folders(run):
    data = ImageFolderDataModule(str(run[0]), image_size=16, num_workers=0, classes=["wasp", *CLASSES])
    data.setup("validate")
    labels = torch.cat([labels for _, labels, *_ in data.val_dataloader()])
    assert labels.tolist() == np.repeat(np.arange(1, 5), 4).tolist()
    for wrong in ([], ["cat", "cat"]):
        with pytest.raises(ValueError, match=r"classes: got .* allowed are one or more different names"):
            ImageFolderDataModule(str(run[0]), classes=wrong)


def test_ten_other_folders_are_no_test_set_of_cifar(tmp_path):
    names = [f"class{number}" for number in range(10)]
    images(tmp_path, "train", names, 2, 32)
    images(tmp_path, "test", [*names[1:], "zebra"], 1, 32)
    data = CIFAR10DataModule(str(tmp_path), cache=False, val_fraction=0.5, batch_size=4)
    data.setup("fit")
    with pytest.raises(
        ValueError, match="root: class 0 of the network is 'class0', that of the data is 'class1'"
    ):
        data.setup("test")


@pytest.mark.filterwarnings("ignore:root. the test split has no images of 'cat'")
@pytest.mark.integration
def test_an_export_is_not_verified_on_other_classes(run, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra 'export')")
    from lightning_n2uq.export import command as export

    other, fewer = tmp_path / "other", tmp_path / "fewer"
    images(other, "test", ["ant", "cat", "dog", "horse"], 2)
    shutil.copytree(run[0] / "val", fewer / "test", ignore=shutil.ignore_patterns("cat"))
    arguments = ["--ckpt", str(run[1]), "-o", str(tmp_path / "net.onnx"), "--engines", "torch,numpy"]
    with pytest.raises(ValueError, match="has the unknown class 'ant'"):
        export.main([*arguments, "--verify", str(other)])
    assert export.main([*arguments, "--verify", str(fewer)]) == 0
