"""Made-up images of any shape: for smoke tests and for measuring speed without data."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_n2uq.datamodules.arrays import Normalization
from lightning_n2uq.datamodules.base import Split, check_at_least
from lightning_n2uq.datamodules.in_memory import ArrayDataModule
from lightning_n2uq.datamodules.keyed import keyed_seed

_CHUNK = 64  # images made at a time: bounds the float32 working memory
_GRID = 4  # a class pattern is smooth noise on this many cells per side, which convolutions learn quickly


class SyntheticDataModule(ArrayDataModule):
    """Each class is a smooth random pattern, each image its class's pattern plus white noise.

    Everything follows from `seed`; the splits share the patterns and differ in the noise. Classes are
    balanced to within one image. Takes ``count * in_channels * image_size^2`` bytes.

    Args:
        num_classes: number of classes.
        in_channels: channels of an image.
        image_size: height and width in pixels.
        num_train: training images.
        num_val: validation images.
        num_test: test images.
        noise: standard deviation of the noise, relative to that of the patterns.
        batch_size: images per step and process.
        seed: seed of patterns, noise and order.
        num_workers: loader processes; 0 is the fastest.
        drop_last: leave out the last, smaller batch of a training epoch.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        num_train: int = 512,
        num_val: int = 128,
        num_test: int = 128,
        noise: float = 0.5,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            # Mid grey is 0 and a pattern has unit variance: see `_images` for 0.5 and 0.125.
            normalization=Normalization((0.5,) * in_channels, (0.125,) * in_channels),
            augmentation=None,
            num_classes=num_classes,
            in_channels=in_channels,
            image_size=image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            drop_last=drop_last,
        )
        for name, count in (("num_train", num_train), ("num_val", num_val), ("num_test", num_test)):
            check_at_least(name, count, 1)
        if not noise >= 0:
            raise ValueError(f"noise: got {noise}, allowed: 0 and above")
        self.sizes: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}
        self.noise = noise

    def load_arrays(self, split: Split) -> tuple[Tensor, Tensor]:
        """Makes the images ``[N, C, H, W]`` uint8 and labels ``[N]`` of one split."""
        generator = torch.Generator().manual_seed(keyed_seed(self.seed, 1 + list(self.sizes).index(split)))
        labels = torch.arange(self.sizes[split]) % self.num_classes
        labels = labels[torch.randperm(len(labels), generator=generator)]
        patterns = self._patterns()
        images = [self._images(patterns[chunk], generator) for chunk in torch.split(labels, _CHUNK)]
        return torch.cat(images), labels

    def _patterns(self) -> Tensor:
        """``[classes, C, g, g]`` with ``g`` at most `_GRID`."""
        cells = min(_GRID, self.image_size)
        generator = torch.Generator().manual_seed(keyed_seed(self.seed, 0))
        return torch.randn(self.num_classes, self.in_channels, cells, cells, generator=generator)

    def _images(self, patterns: Tensor, generator: torch.Generator) -> Tensor:
        """Enlarges patterns ``[B, C, g, g]`` and adds noise; uint8 with mean 128 and 32 per unit."""
        clean = interpolate(patterns, size=(self.image_size, self.image_size), mode="nearest")
        noisy = clean + self.noise * torch.randn(clean.shape, generator=generator)
        return (noisy * 32 + 128).clamp_(0, 255).to(torch.uint8)
