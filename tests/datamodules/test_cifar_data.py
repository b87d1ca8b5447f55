"""CIFAR-10 and CIFAR-100 from pickles, image folders and archives."""

import hashlib
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_n2uq.datamodules import CIFAR10DataModule, CIFAR100DataModule, DataNotFoundError
from lightning_n2uq.datamodules._data.decode import BrokenImageError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10-images.zip"
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """10 classes, 6 training and 2 test images each; an image's grey level tells its class."""
    root = tmp_path_factory.mktemp("cifar")
    for split, count in (("train", 6), ("test", 2)):
        for label, name in enumerate(NAMES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (32, 32), (label * 20,) * 3)
                image.save(root / split / name / f"{number:04}.png")
    return root


@pytest.fixture(scope="module")
def archive(folder):
    path = folder.parent / "cifar.zip"
    with zipfile.ZipFile(path, "w") as file:
        for image in folder.rglob("*.png"):
            file.write(image, image.relative_to(folder).as_posix())
    return path


def module(root, tmp_path, **changes):
    return CIFAR10DataModule(str(root), **{"batch_size": 10, "cache_dir": str(tmp_path / "cache"), **changes})


def loaded(data):
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_image_files_become_arrays_and_labels(kind, tmp_path, request):
    data = loaded(module(request.getfixturevalue(kind), tmp_path, val_fraction=1 / 3))

    assert {split: len(part) for split, part in data.splits.items()} == {"train": 40, "val": 20, "test": 20}
    for part in data.splits.values():
        assert torch.equal(part.images[:, 1, 16, 16] // 20, part.labels.to(torch.uint8))
        assert torch.bincount(part.labels).unique().numel() == 1
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 3, 32)


def test_cache_is_read_again_and_follows_changes(folder, tmp_path, monkeypatch):
    own = tmp_path / "copy"
    shutil.copytree(folder, own)
    first = loaded(module(own, tmp_path)).splits["test"].images
    files = set((tmp_path / "cache").iterdir())
    assert {file.suffix for file in files} == {".npy"}

    with monkeypatch.context() as patch:
        patch.setattr("lightning_n2uq.datamodules._data.cache.decode", None)
        assert torch.equal(loaded(module(own, tmp_path)).splits["test"].images, first)

    Image.new("RGB", (32, 32), (255, 0, 0)).save(own / "test" / "truck" / "0001.png")
    changed = loaded(module(own, tmp_path)).splits["test"].images
    assert not torch.equal(changed, first)
    assert changed[-1, 0].unique().tolist() == [255]


def test_an_interrupted_write_leaves_no_file(folder, tmp_path, monkeypatch):
    def interrupted(file, array):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_n2uq.datamodules._data.cache.np.save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module(folder, tmp_path).prepare_data()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_done_without(folder, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    data = module(folder, tmp_path)

    with pytest.warns(UserWarning, match="decoded images are not cached"):
        data.setup("test")
    assert len(data.splits["test"]) == 20


def test_augmentation_on_the_device_gives_the_same_pixels(folder, tmp_path):
    here = loaded(module(folder, tmp_path, seed=3))
    there = loaded(module(folder, tmp_path, seed=3, augment_on_device=True))
    for loader in ("train_dataloader", "val_dataloader"):
        for one, two in zip(getattr(here, loader)(), getattr(there, loader)(), strict=True):
            assert two[0].dtype == torch.uint8
            images, labels = there.on_after_batch_transfer(two, 0)
            assert torch.equal(images, one[0])
            assert torch.equal(labels, one[1])
            assert here.on_after_batch_transfer(one, 0) is one


def test_train_fraction_is_stratified_and_leaves_validation_alone(folder, tmp_path):
    part = loaded(module(folder, tmp_path, val_fraction=0.5, train_fraction=1 / 3))
    whole = loaded(module(folder, tmp_path, val_fraction=0.5))

    assert torch.bincount(part.splits["train"].labels).tolist() == [1] * 10
    assert torch.bincount(whole.splits["train"].labels).tolist() == [3] * 10
    assert torch.equal(part.splits["val"].images, whole.splits["val"].images)


def test_no_validation_share_validates_on_the_test_images(folder, tmp_path):
    data = loaded(module(folder, tmp_path, val_fraction=0))

    assert len(data.splits["train"]) == 60
    assert torch.equal(data.splits["val"].images, data.splits["test"].images)


def test_a_damaged_file_is_named(folder, tmp_path):
    own = tmp_path / "copy"
    shutil.copytree(folder, own)
    (own / "test" / "cat" / "0001.png").write_bytes(b"nothing")

    with pytest.raises(BrokenImageError, match=r"copy/test/cat/0001\.png"):
        module(own, tmp_path).prepare_data()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: path / "nowhere",
            r"^root: got '.*nowhere', which does not exist; expected a folder with",
        ),
        (
            lambda path: path,
            r"^root: got '.*', which holds no data; expected a folder with cifar-10-batches-py/",
        ),
    ],
)
def test_missing_data_is_one_line(make, message, tmp_path):
    with pytest.raises(DataNotFoundError, match=message) as caught:
        CIFAR10DataModule(str(make(tmp_path))).setup("fit")
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_wrong_number_of_classes_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="allowed are 100 class folders in test/, there are 10"):
        CIFAR100DataModule(str(folder), cache=False).setup("test")


def test_a_file_that_is_no_archive_is_named(tmp_path):
    (tmp_path / "data.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"^root: got '.*data\.zip', which is no readable \.zip"):
        CIFAR10DataModule(str(tmp_path / "data.zip"), cache=False).setup("test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_fraction": 1.0}, "val_fraction: got 1.0"),
        ({"train_fraction": 0.0}, "train_fraction: got 0.0"),
        ({"split_seed": -1}, "split_seed: got -1"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CIFAR10DataModule(**arguments)


def write_pickles(root, name, label_key, count):
    """Files of the official form with a few images; returns their names and checksums."""
    rng = np.random.default_rng(0)
    sums = {}
    (root / name).mkdir()
    files = ["data_batch_1", "test_batch"] if count == 10 else ["train", "test"]
    for file in files:
        table = {
            "data": rng.integers(0, 256, (2 * count, 3072)).astype(np.uint8),
            label_key: [*range(count)] * 2,
        }
        blob = pickle.dumps(table)
        (root / name / file).write_bytes(blob)
        sums[file] = hashlib.md5(blob).hexdigest()
    blob = pickle.dumps({"label_names": NAMES, "fine_label_names": NAMES})
    (root / name / "meta").write_bytes(blob)
    return sums, hashlib.md5(blob).hexdigest()


@pytest.mark.parametrize(
    ("cls", "label_key", "count"),
    [(CIFAR10DataModule, "labels", 10), (CIFAR100DataModule, "fine_labels", 100)],
)
def test_official_pickles(cls, label_key, count, tmp_path, monkeypatch):
    from torchvision import datasets

    sums, meta = write_pickles(tmp_path, cls.pickles, label_key, count)
    official = getattr(datasets, cls.__name__.removesuffix("DataModule"))
    train, test = sums.items()
    monkeypatch.setattr(official, "train_list", [list(train)])
    monkeypatch.setattr(official, "test_list", [list(test)])
    key = "label_names" if count == 10 else "fine_label_names"
    monkeypatch.setattr(official, "meta", {"filename": "meta", "key": key, "md5": meta})

    data = loaded(cls(str(tmp_path), batch_size=5, val_fraction=0.5))

    assert [len(data.splits[split]) for split in ("train", "val", "test")] == [count, count, 2 * count]
    assert data.splits["test"].labels.tolist() == [*range(count)] * 2
    table = pickle.loads((tmp_path / cls.pickles / test[0]).read_bytes())
    assert data.splits["test"].images.flatten(1).tolist() == table["data"].tolist()

    (tmp_path / cls.pickles / test[0]).write_bytes(b"damaged")
    with pytest.raises(DataNotFoundError, match="is incomplete or damaged"):
        cls(str(tmp_path)).setup("test")


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    def refuse(self, train, download):
        raise OSError("no route to host")

    monkeypatch.setattr(CIFAR10DataModule, "official", refuse)
    with pytest.raises(
        DataNotFoundError, match=r"^download: got True, failed for root .*: no route to host$"
    ):
        CIFAR10DataModule(str(tmp_path), download=True).prepare_data()


@pytest.mark.skipif(not SHARED.is_file(), reason="the archive of CIFAR-10 images is not beside this checkout")
def test_all_cifar10_images_are_read_in_place(tmp_path):
    from lightning_n2uq.datamodules._data.cache import load_decoded
    from lightning_n2uq.datamodules._data.image_files import open_source

    source = open_source(SHARED)
    names = source.images("train")
    some = load_decoded(source, names[::250], 32, 3, None)

    assert source.folders("train") == source.folders("test") == NAMES
    assert (len(names), len(source.images("test"))) == (50000, 10000)
    found = (some.double() / 255).mean((0, 2, 3))
    expected = torch.tensor(CIFAR10DataModule.statistics.mean, dtype=torch.float64)
    assert (found - expected).abs().max() < 0.03
