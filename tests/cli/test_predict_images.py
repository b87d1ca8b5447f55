"""`n2uq predict --images`: files, folders and archives by class names; nothing is lost."""

import csv
import zipfile
from pathlib import Path

import pytest
import torch

from lightning_n2uq.cli import main
from lightning_n2uq.datamodules import ImageFolderDataModule
from lightning_n2uq.modules import QuantizedClassifier
from own_photos import write_photos

pytestmark = pytest.mark.integration

TINY = [
    "--config", "images/n2uq_w2a2.yaml", "--model.backbone_args", "{width: 4}", "--data.image_size", "16",
    "--data.num_workers", "0", "--data.batch_size", "8", "--trainer.max_epochs", "3", "--model.lr", "0.01",
    "--trainer.enable_model_summary", "false", "--wandb", "disabled", "--trainer.accelerator", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Photos in a plain folder, and the best checkpoint of a network trained on them."""
    folder = tmp_path_factory.mktemp("own")
    photos = write_photos(folder / "photos", 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", *TINY, "--data.root", "photos"]) == 0
    (best,) = (folder / "runs").rglob("best.ckpt")
    return photos, best


def rows(path="predictions.csv"):
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def predict(run, images, *more):
    return main(["predict", "--ckpt_path", str(run[1]), "--images", str(images), *more])


def test_a_folder_is_answered_by_name_and_probability_as_the_module_answers(run, in_empty_folder, capsys):
    assert predict(run, run[0], "--batch_size", "7") == 0
    table = rows()
    assert [row["file"] for row in table] == [
        f"{name}/{number:03}.jpg" for name in ("apple", "leaf", "sky") for number in range(20)
    ]
    assert list(table[0]) == [
        "file", "class", "probability", "class_2", "probability_2", "class_3", "probability_3", "error",
    ]  # fmt: skip
    data = ImageFolderDataModule(str(run[0]), image_size=16, num_workers=0, batch_size=8)
    data.setup("test")
    module = QuantizedClassifier.load_from_checkpoint(run[1]).eval()
    test = data.splits["test"]
    images = torch.stack([test[index][0] for index in range(len(test))])
    answers = {test.name(index): index for index in range(len(test))}
    wanted = module.predict_step(images, 0)["probabilities"]
    for row in table:
        if (index := answers.get(row["file"])) is not None:
            best = wanted[index].argmax().item()
            assert row["class"] == data.class_names[best]
            assert float(row["probability"]) == pytest.approx(wanted[index, best].item(), abs=2e-6)
    assert "60 images: " in capsys.readouterr().out


def test_a_file_and_a_zip_are_answered_like_their_folder(run, in_empty_folder, capsys):
    assert predict(run, run[0], "-o", "folder.csv") == 0
    with zipfile.ZipFile("photos.zip", "w") as archive:
        for file in run[0].rglob("*.jpg"):
            archive.write(file, file.relative_to(run[0].parent).as_posix())
    assert predict(run, "photos.zip", "-o", "zip.csv", "--num_workers", "2") == 0
    assert rows("zip.csv") == rows("folder.csv")
    capsys.readouterr()
    assert predict(run, run[0] / "sky" / "003.jpg", "-o", "file.csv") == 0
    (row,) = rows("file.csv")
    assert row == {**next(r for r in rows("folder.csv") if r["file"] == "sky/003.jpg"), "file": "003.jpg"}
    assert capsys.readouterr().out.startswith(f"003.jpg: {row['class']} ")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_broken_images_are_named_and_the_others_are_answered(run, in_empty_folder, capsys, workers):
    photos = write_photos(in_empty_folder / "photos", 3)
    broken = photos / "leaf" / "001.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    (photos / "sky" / "empty.png").write_bytes(b"")
    assert predict(run, photos, "--num_workers", workers, "--batch_size", "2") == 0
    table = {row["file"]: row for row in rows()}
    assert len(table) == 10
    for name in ("leaf/001.jpg", "sky/empty.png"):
        assert f"broken image file {photos}/{name}" in table[name]["error"]
        assert table[name]["class"] == ""
    assert sum(bool(row["class"]) for row in table.values()) == 8
    seen = capsys.readouterr()
    assert f"warning: broken image file {broken}: " in seen.err
    assert "10 images: " in seen.out
    assert "; 2 broken" in seen.out


def test_mistakes_are_one_line(run, in_empty_folder, capsys):
    (in_empty_folder / "bare").mkdir()
    (in_empty_folder / "no.zip").write_bytes(b"x")
    photo = run[0] / "sky" / "000.jpg"
    cases = [
        ([str(run[1]), "gone"], "images: got 'gone', which does not exist; expected an image, a folder"),
        ([str(run[1]), "bare"], "images: got 'bare', which holds no images (.jpg,"),
        ([str(run[1]), "no.zip"], "images: got 'no.zip', which is no readable .zip"),
        (["nope.ckpt", str(photo)], "ckpt_path: no such file 'nope.ckpt'"),
        ([str(run[1].parent), str(photo)], f"is a checkpoint file; did you mean {run[1]}?"),
        ([str(photo), str(photo)], "is damaged, cut short, or no checkpoint"),
        ([str(run[1]), str(photo), "-o", "no/such/x.csv"], "output: got 'no/such/x.csv'"),
        ([str(run[1]), str(photo), "--device", "mars"], "device: got 'mars', allowed are cpu and cuda"),
        ([str(run[1]), str(photo), "--batch_size", "0"], "batch_size: got 0"),
    ]
    for (checkpoint, images, *more), message in cases:
        assert main(["predict", "--ckpt", checkpoint, "--images", images, *more]) == 2, message
        line = capsys.readouterr().err.strip()
        assert message in line
        assert "\n" not in line


def test_a_checkpoint_without_preprocessing_says_so(run, in_empty_folder, capsys):
    content = torch.load(run[1], weights_only=True)
    del content["ImageFolderDataModule"]["preprocessing"]
    torch.save(content, "old.ckpt")
    assert main(["predict", "--ckpt_path", "old.ckpt", "--images", str(run[0])]) == 2
    assert "'old.ckpt' does not say how image files become its input" in capsys.readouterr().err


def test_the_test_split_of_a_run_is_the_one_it_was_trained_without(run, in_empty_folder, capsys):
    assert main(["test", "--ckpt_path", str(run[1]), "--data.root", str(run[0]), "--wandb", "disabled"]) == 0
    write_photos(in_empty_folder / "more", 21)
    capsys.readouterr()
    assert main(["test", "--ckpt_path", str(run[1]), "--data.root", "more", "--wandb", "disabled"]) == 2
    assert "root: 'more' has other images in its train split" in capsys.readouterr().err


def test_the_monitor_keeps_the_names_beside_the_confusion(run):
    import json

    kept = json.loads((run[1].parent / "confusion.json").read_text())
    assert kept["class_names"] == ["apple", "leaf", "sky"]
