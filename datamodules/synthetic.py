"""Made-up images of any shape: for smoke tests and for measuring speed without data."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_n2uq.datamodules._data.arrays import Normalization
from lightning_n2uq.datamodules._data.base import Split
from lightning_n2uq.datamodules._data.counter_rng import generator_seed
from lightning_n2uq.datamodules._data.in_memory import ArrayDataModule
from lightning_n2uq.utils.validation import check_integer, check_number

_CHUNK = 64  # images made at a time: bounds the float32 working memory
_GRID = 4  # a class pattern is smooth noise on this many cells per side, which convolutions learn quickly


class SyntheticDataModule(ArrayDataModule):
    """Each class is a smooth random pattern, each image its class's pattern plus white noise.

    Everything follows from `seed`; the splits share the patterns and differ in the noise. Classes are
    balanced to within one image. Takes `count * in_channels * image_size^2` bytes.

    Args:
        num_classes: The number of classes.
        in_channels: The channels of an image.
        image_size: The height and width of an image in pixels.
        num_train: The number of training images.
        num_val: The number of validation images.
        num_test: The number of test images.
        noise: The standard deviation of the noise, relative to that of the patterns.
        batch_size: Images per step and process.
        seed: The seed of patterns, noise and order.
        num_workers: Loader processes; 0 is the fastest.
        drop_last: Leaves out the last, smaller batch of a training epoch.

    Raises:
        ValueError: An argument is out of range.
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
        self.sizes: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}
        for split, count in self.sizes.items():
            check_integer(f"num_{split}", count, 1)
        self.noise = check_number("noise", noise, 0)

    def load_arrays(self, split: Split) -> tuple[Tensor, Tensor]:
        """Makes the images `[N, C, H, W]` uint8 and labels `[N]` of one split."""
        stream = 1 + list(self.sizes).index(split)
        generator = torch.Generator().manual_seed(generator_seed(self.seed, stream))
        labels = torch.arange(self.sizes[split]) % self.num_classes
        labels = labels[torch.randperm(len(labels), generator=generator)]
        patterns = self._patterns()
        images = [self._images(patterns[chunk], generator) for chunk in torch.split(labels, _CHUNK)]
        return torch.cat(images), labels

    def _patterns(self) -> Tensor:
        """Returns the patterns `[classes, C, g, g]` with `g` at most `_GRID`."""
        cells = min(_GRID, self.image_size)
        generator = torch.Generator().manual_seed(generator_seed(self.seed, 0))
        return torch.randn(self.num_classes, self.in_channels, cells, cells, generator=generator)

    def _images(self, patterns: Tensor, generator: torch.Generator) -> Tensor:
        """Enlarges patterns `[B, C, g, g]` and adds noise; returns uint8 with mean 128 and 32 per unit."""
        clean = interpolate(patterns, size=(self.image_size, self.image_size), mode="nearest")
        noisy = clean + self.noise * torch.randn(clean.shape, generator=generator)
        return (noisy * 32 + 128).clamp_(0, 255).to(torch.uint8)
