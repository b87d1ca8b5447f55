"""A plain folder of classes: how it is cut, what is said about it, what a checkpoint keeps."""

import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_n2uq.datamodules import DataNotFoundError, ImageFolderDataModule
from lightning_n2uq.datamodules._data import class_folders
from lightning_n2uq.utils.preprocessing import Preprocessing, preprocessing_from, saved_preprocessing

pytestmark = pytest.mark.filterwarnings("ignore:batch_size")


def photos(root, **counts):
    for level, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", (20, 20), (40 * level, number, 0)).save(root / name / f"{number:03}.png")
    return root


def module(root, **changes):
    return ImageFolderDataModule(
        str(root), **{"image_size": 16, "batch_size": 4, "num_workers": 0, **changes}
    )


def files(data):
    return {split: {part.name(i) for i in range(len(part))} for split, part in data.splits.items()}


@pytest.fixture
def pets(tmp_path):
    return photos(tmp_path / "pets", cat=20, dog=40)


def test_a_plain_folder_is_cut_by_class_without_overlap(pets):
    data = module(pets, val_fraction=0.2, test_fraction=0.1)
    data.setup()
    assert data.class_names == ["cat", "dog"]
    counts = {split: part.labels.bincount().tolist() for split, part in data.splits.items()}
    assert counts == {"train": [14, 28], "val": [4, 8], "test": [2, 4]}
    assert len(set.union(*files(data).values())) == 60
    assert all(name.startswith(data.class_names[label]) for name, label in labelled(data, "test"))


def labelled(data, split):
    part = data.splits[split]
    return [(part.name(index), int(part.labels[index])) for index in range(len(part))]


def test_the_cut_follows_from_split_seed_and_from_nothing_else(pets):
    parts = []
    for changes in ({}, {"seed": 5, "batch_size": 8}, {"split_seed": 1}):
        data = module(pets, **changes)
        data.setup()
        parts.append(files(data))
    assert parts[0] == parts[1]
    assert parts[0]["test"] != parts[2]["test"]


def test_a_zip_of_it_is_cut_alike(pets, tmp_path):
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for file in pets.rglob("*.png"):
            archive.write(file, f"pets/{file.relative_to(pets).as_posix()}")
        archive.writestr("pets/.hidden/x.png", b"")
    plain, packed = module(pets), module(tmp_path / "pets.zip")
    for data in (plain, packed):
        data.setup()
    assert files(plain) == files(packed)


def test_training_images_alone_are_cut_and_a_test_folder_stays_whole(tmp_path):
    photos(tmp_path / "train", cat=20, dog=20)
    data = module(tmp_path)
    data.setup()
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 32, "val": 4, "test": 4}
    photos(tmp_path / "test", cat=3, dog=3)
    data = module(tmp_path)
    data.setup()
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 36, "val": 4, "test": 6}


def test_without_a_test_share_the_validation_images_are_the_test(pets):
    data = module(pets, test_fraction=0)
    data.setup()
    assert files(data)["val"] == files(data)["test"]


def test_counts_and_split_are_said_at_the_start(pets, caplog):
    with caplog.at_level("INFO"):
        module(pets).setup("fit")
    said = " ".join(caplog.text.split())
    assert "2 classes, cut with val_fraction 0.1, test_fraction 0.1, split_seed 0" in said
    assert "class train val test cat 16 2 2 dog 32 4 4 all 48 6 6" in said


def test_many_classes_are_summed_up():
    text = class_folders.table([f"c{n}" for n in range(30)], {"train": list(range(30))})
    assert "(11 more)  19..29" in text
    assert text.splitlines()[-1].split() == ["all", "435"]


def test_an_empty_class_folder_is_no_class_and_is_named(pets):
    (pets / "emu").mkdir()
    (pets / "emu" / "notes.txt").write_text("")
    data = module(pets)
    assert data.num_classes == 2
    with pytest.warns(UserWarning, match=r"root: 'emu' has no images and is no class \(images are .jpg"):
        data.setup("fit")


def test_a_class_that_a_split_lacks_is_named(tmp_path):
    photos(tmp_path / "train", cat=4, dog=4)
    photos(tmp_path / "val", dog=4)
    with pytest.warns(UserWarning, match="root: the val split has no images of 'cat'"):
        module(tmp_path).setup("fit")


def test_a_class_too_small_to_be_cut_is_named(tmp_path):
    photos(tmp_path, cat=1, dog=20)
    data = module(tmp_path)
    with pytest.warns(UserWarning, match="split has no images") as said:
        data.setup()
    lines = {str(line.message) for line in said}
    assert {f"root: the {split} split has no images of 'cat'" for split in ("val", "test")} <= lines


def test_every_split_gets_an_image_of_a_class_that_has_three():
    for count in range(3, 30):
        labels = torch.zeros(count, dtype=torch.int64)
        parts = class_folders.cut_by_class(labels, (0.1, 0.1), True, seed=count)
        assert sorted(torch.cat(parts).tolist()) == list(range(count))
        assert min(map(len, parts)) >= 1
        assert abs(len(parts[1]) - 0.1 * count) < 1


def test_fewer_images_than_a_batch_train_all_the_same(tmp_path):
    photos(tmp_path, cat=10, dog=10)
    data = module(tmp_path, batch_size=64)
    with pytest.warns(
        UserWarning, match="batch_size: got 64, the training split has 16 images: a batch has 16"
    ):
        data.setup("fit")
    assert [len(labels) for _, labels in data.train_dataloader()] == [16]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_fraction": 0.0}, "val_fraction: got 0.0"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "shares with a sum below 1"),
        ({"test_fraction": 1.0}, "test_fraction: got 1.0"),
        ({"split_seed": -1}, "split_seed: got -1"),
    ],
)
def test_impossible_shares_are_named(pets, changes, message):
    with pytest.raises(ValueError, match=message):
        module(pets, **changes)


def test_a_share_that_a_folder_makes_void_is_said(tmp_path):
    photos(tmp_path / "train", cat=4, dog=4)
    photos(tmp_path / "val", cat=4, dog=4)
    with pytest.warns(UserWarning, match=r"val_fraction: got 0.3, not used: .* has folders for its splits"):
        module(tmp_path, val_fraction=0.3).setup("fit")


def test_folders_that_are_no_classes_are_named(tmp_path):
    photos(tmp_path / "one" / "pets", cat=2, dog=2)
    with pytest.raises(
        ValueError, match=r"one class folder \('pets'\), allowed are two or more; did you mean"
    ):
        module(tmp_path / "one")
    photos(tmp_path / "near" / "Train", cat=2)
    with pytest.raises(ValueError, match="a folder 'Train'; splits are called train, val and test"):
        module(tmp_path / "near")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataNotFoundError, match="holds no class folders; expected <class>/"):
        module(tmp_path / "bare")


def test_a_checkpoint_keeps_classes_counts_split_and_preprocessing(pets):
    data = module(pets)
    data.setup("fit")
    state = data.state_dict()
    assert state["class_names"] == ["cat", "dog"]
    assert {split: part["counts"] for split, part in state["splits"].items()} == {
        "train": [16, 32], "val": [2, 4], "test": [2, 4],
    }  # fmt: skip
    kept = saved_preprocessing({"ImageFolderDataModule": state})
    assert kept == Preprocessing(3, 18, 16, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    other = module(pets)
    other.setup("test")
    other.load_state_dict(state)  # the same images, cut in the same way


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_images_that_would_be_cut_in_another_way_are_refused(pets, stage):
    data = module(pets)
    data.setup("fit")
    state = data.state_dict()
    for changes in ({"split_seed": 1}, {"val_fraction": 0.3}):
        other = module(pets, **changes)
        other.setup(stage)
        with pytest.raises(ValueError, match=r"root: .* other images in its train split"):
            other.load_state_dict(state)
    photos(pets, cat=21)
    other = module(pets)
    other.setup(stage)
    with pytest.raises(ValueError, match=r"\(48 then, 49 now\), so that test images might be ones"):
        other.load_state_dict(state)


def test_a_resumed_run_has_to_find_the_training_images_that_it_had(tmp_path):
    for split in ("train", "val"):
        photos(tmp_path / split, cat=4, dog=4)
    data = module(tmp_path)
    data.setup("fit")
    state = data.state_dict()
    (tmp_path / "train" / "cat" / "000.png").unlink()
    data = module(tmp_path)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"train split than .* \(8 then, 7 now\), so that the order"):
        data.load_state_dict(state)
    photos(tmp_path / "test", dog=2)
    data = module(tmp_path)
    with pytest.warns(UserWarning, match="the test split has no images of 'cat'"):
        data.setup("test")
    data.load_state_dict(state)  # another test set is no other run


@pytest.mark.parametrize("change", [{"crop": "x"}, {"mean": [1.0]}, {"std": [float("nan")] * 3}, {"crop": 0}])
def test_impossible_preprocessing_in_a_file_is_refused(change):
    values = Preprocessing(3, None, 32, (0.5,) * 3, (0.25,) * 3).as_dict()
    with pytest.raises(ValueError, match="ckpt: its preprocessing"):
        preprocessing_from({**values, **change}, "ckpt")


def test_paths_with_a_tilde_and_hidden_folders(pets, monkeypatch):
    monkeypatch.setenv("HOME", str(pets.parent))
    hidden = pets / "cat" / ".ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "000-checkpoint.png").write_bytes(b"")
    data = module(Path("~/pets"))
    data.setup("fit")
    assert sum(sum(part["counts"]) for part in data.split_state().values()) == 60
