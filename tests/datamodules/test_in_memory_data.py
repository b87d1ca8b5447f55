"""Digits, synthetic images, splits, counter-based random numbers, batch augmentation."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_n2uq import datamodules
from lightning_n2uq.datamodules import DigitsDataModule, SyntheticDataModule
from lightning_n2uq.datamodules._data.arrays import CropFlip, Normalization
from lightning_n2uq.datamodules._data.counter_rng import random_bits, random_integers
from lightning_n2uq.datamodules._data.splits import stratified_split


def loaded(data):
    data.setup()
    return data


@pytest.fixture(scope="module")
def digits():
    return loaded(DigitsDataModule())


def test_digits_splits_are_disjoint_complete_and_stratified(digits):
    images = [digits.splits[split].images for split in ("train", "val", "test")]
    labels = [digits.splits[split].labels for split in ("train", "val", "test")]

    assert [len(part) for part in labels] == [1437, 180, 180]
    from sklearn.datasets import load_digits

    whole = sorted(map(tuple, load_digits().data.astype(int).tolist()))
    assert sorted(map(tuple, torch.cat(images).flatten(1).tolist())) == whole
    for part, share in zip(labels, (0.8, 0.1, 0.1), strict=True):
        expected = torch.bincount(torch.cat(labels)) * share
        assert (torch.bincount(part) - expected).abs().max() <= 1


def test_digits_shapes_are_known_before_loading():
    data = DigitsDataModule()

    assert (data.num_classes, data.in_channels, data.image_size, data.batch_size) == (10, 1, 8, 64)
    assert data.splits == {}


def test_digits_batches_are_normalized(digits):
    batches = list(digits.val_dataloader())
    images = torch.cat([images for images, _ in batches])

    assert [len(labels) for _, labels in batches] == [64, 64, 52]
    assert images.shape == (180, 1, 8, 8)
    assert images.dtype == torch.float32
    assert batches[0][1].dtype == torch.int64
    assert images.mean().abs() < 0.05
    assert abs(images.std() - 1) < 0.05


def test_split_seed_alone_changes_the_split(digits):
    same, other = loaded(DigitsDataModule(seed=9)), loaded(DigitsDataModule(split_seed=9))

    assert torch.equal(same.splits["test"].images, digits.splits["test"].images)
    assert not torch.equal(other.splits["test"].images, digits.splits["test"].images)


def test_an_epoch_of_digits_loads_in_milliseconds(digits):
    loader = digits.train_dataloader()
    seconds = []
    for _ in range(5):
        start = time.process_time()  # the machine may be busy with other work
        count = sum(len(labels) for _, labels in loader)
        seconds.append(time.process_time() - start)

    assert count == 1437
    assert min(seconds) < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0, allowed are integers from 1"),
        ({"val_fraction": 0.0}, "val_fraction: got 0.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.6}, "val_fraction: got 0.5"),
        ({"shift": 5}, "shift: got 5, allowed is 0 to 4"),
        ({"num_workers": -1}, "num_workers: got -1"),
        ({"num_workers": 100_000}, "num_workers: got 100000, allowed is 0 to "),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**arguments)


def test_a_batch_larger_than_the_training_split_is_refused():
    line = r"^batch_size: got 5000, allowed is 1 to 1437 \(the training split has 1437 images\)$"
    with pytest.raises(ValueError, match=line):
        DigitsDataModule(batch_size=5000).setup("fit")
    DigitsDataModule(batch_size=1437).setup("fit")
    DigitsDataModule(batch_size=5000).setup("test")


def test_a_batch_larger_than_a_process_share_is_refused():
    data = DigitsDataModule(batch_size=800)
    data.trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)

    with pytest.raises(ValueError, match=r"got 800, allowed is 1 to 719 .* over 2 processes"):
        data.setup("fit")


@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 8, 3), (3, 33, 10), (4, 3, 2)])
def test_synthetic_shapes_balance_and_determinism(channels, size, classes):
    arguments = {"num_classes": classes, "in_channels": channels, "image_size": size, "num_train": 100}
    one, two = (loaded(SyntheticDataModule(**arguments, seed=4, batch_size=20)) for _ in range(2))
    images, labels = next(iter(one.train_dataloader()))

    assert images.shape == (20, channels, size, size)
    assert labels.max() < classes
    counts = torch.bincount(one.splits["train"].labels)
    assert counts.max() - counts.min() <= 1
    assert torch.equal(one.splits["train"].images, two.splits["train"].images)
    other = loaded(SyntheticDataModule(**arguments, seed=5, batch_size=20))
    assert not torch.equal(one.splits["train"].images, other.splits["train"].images)
    assert not torch.equal(one.splits["train"].images[:20], one.splits["val"].images[:20])


def test_synthetic_classes_can_be_learned():
    data = loaded(SyntheticDataModule(num_train=300, num_test=200, batch_size=300, noise=1.0))
    images, labels = next(iter(data.train_dataloader()))
    means = torch.stack([images[labels == label].mean(0) for label in range(10)])
    test_images = torch.cat([batch[0] for batch in data.test_dataloader()])

    nearest = torch.cdist(test_images.flatten(1), means.flatten(1)).argmin(1)

    assert (nearest == data.splits["test"].labels).float().mean() > 0.95


def test_stratified_split_is_exact_in_size_and_fair_to_each_class():
    labels = torch.tensor([0] * 50 + [1] * 31 + [2] * 7 + [3])
    parts = stratified_split(labels[torch.randperm(89)], (0.5, 0.25, 0.25), seed=1)

    assert [len(part) for part in parts] == [44, 22, 23]
    assert sorted(torch.cat(parts).tolist()) == list(range(89))


@pytest.mark.parametrize("fractions", [(0.5, 0.6), (0.0, 0.5), (float("nan"),)])
def test_impossible_fractions_are_refused(fractions):
    with pytest.raises(ValueError, match="fractions: got"):
        stratified_split(torch.zeros(10, dtype=torch.int64), fractions, seed=0)


def test_random_integers_depend_on_seed_and_sample_id_alone_and_are_uniform():
    sample_ids = list(range(20000))
    draws = random_integers(7, sample_ids, (9, 9, 2))

    assert torch.equal(draws[[5, 3]], random_integers(7, [5, 3], (9, 9, 2)))
    assert not torch.equal(draws, random_integers(8, sample_ids, (9, 9, 2)))
    counts = torch.bincount(draws[:, 0] * 9 + draws[:, 1], minlength=81)
    chi2 = ((counts - 20000 / 81) ** 2 / (20000 / 81)).sum()
    assert 40 < chi2 < 140  # 80 degrees of freedom: 4.7 deviations either way
    assert abs(draws[:, 2].float().mean() - 0.5) < 0.02
    assert len(set(random_bits(7, sample_ids, 2).ravel().tolist())) == 40000


@pytest.mark.parametrize("flip", [0, 1])
def test_crop_flip_moves_pixels_as_drawn(flip):
    images = torch.arange(2 * 3 * 5 * 4).view(2, 3, 5, 4).to(torch.uint8) + 1
    draws = torch.tensor([[0, 3, flip], [2, 2, flip]])

    moved = CropFlip(pad=2)(images, draws)

    expected = torch.zeros_like(images)
    expected[0, :, 2:, :3] = images[0, :, :3, 1:]
    expected[1] = images[1]
    assert torch.equal(moved, expected.flip(3) if flip else expected)


def test_normalization_uses_each_channels_statistics():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)

    assert Normalization((0.5, 0.25), (0.5, 0.25))(images).flatten().tolist() == [-1.0, 3.0]


FILES = sorted(Path(datamodules.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_modules_import_nothing_heavy(file, monkeypatch):
    for name in ("sklearn", "torchvision", "PIL"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails now
    spec = importlib.util.spec_from_file_location("fresh_copy", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh_copy", module)  # where dataclasses look up annotations

    spec.loader.exec_module(module)
