"""Encoding test images once more: the pixels, and what is counted."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.reencoding import compare, encode_again
from lightning_n2uq.datamodules import CIFAR10DataModule


def test_smooth_images_survive_and_noise_does_not() -> None:
    smooth = torch.linspace(0, 255, 32).to(torch.uint8).expand(1, 3, 32, 32)
    grey = torch.randint(60, 196, (1, 1, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    noise = grey.expand(1, 3, 32, 32)
    for pixels, low, high in ((smooth, 0.0, 3.0), (noise, 5.0, 30.0)):
        again = encode_again(pixels)
        assert again.shape == pixels.shape
        assert again.dtype == torch.uint8
        assert low <= (again.float() - pixels.float()).square().mean().sqrt() <= high
        once = encode_again(pixels, moved=0)
        # On the same grid the second encoding is next to nothing, on another one as much as the first.
        assert (encode_again(once, moved=0).float() - once.float()).square().mean().sqrt() < high / 15
    assert (encode_again(once).float() - once.float()).square().mean().sqrt() > 5
    worse = encode_again(noise, quality=5)
    assert not torch.equal(worse, encode_again(noise))


class Brightness(nn.Module):
    """Says class 1 where the mean of the first row's first pixels is above the middle."""

    def forward(self, images):
        value = images[:, :, 0, 0].mean(1)
        return torch.stack([-value, value], 1)


def test_counts_are_those_of_the_predictions() -> None:
    statistics = CIFAR10DataModule.statistics
    mean, std = (torch.tensor(x).reshape(3, 1, 1) for x in (statistics.mean, statistics.std))
    pixels = torch.randint(0, 256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    images = (pixels / 255 - mean) / std
    again = (encode_again(pixels.to(torch.uint8)) / 255 - mean) / std
    labels = (torch.arange(40) % 2).long()
    dataset = DataLoader(TensorDataset(images, labels), batch_size=16)
    data = SimpleNamespace(setup=lambda stage: None, test_dataloader=lambda: dataset, statistics=statistics)
    first, second = (Brightness()(x).argmax(1) for x in (images, again))
    found = compare(Brightness(), data)
    assert found.images == 40
    assert found.before == pytest.approx(100 * float((first == labels).float().mean()))
    assert found.after == pytest.approx(100 * float((second == labels).float().mean()))
    assert found.changed == pytest.approx(100 * float((first != second).float().mean()))
    assert 0 < found.changed < 100
    assert found.error > 10
