"""Images held in memory as one uint8 tensor, read a batch at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from lightning_n2uq.datamodules._data.counter_rng import random_integers


@dataclass(frozen=True)
class Normalization:
    """Channel statistics: a pixel becomes `(pixel / scale - mean) / std`.

    Attributes:
        mean: The mean of each channel, in units of `scale`.
        std: The standard deviation of each channel, in units of `scale`.
        scale: The pixel value that stands for 1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 255.0

    def __call__(self, images: Tensor) -> Tensor:
        """Normalizes `[B, C, H, W]` of any dtype to float32 on the same device."""
        mean = images.new_tensor(self.mean, dtype=torch.float32).view(1, -1, 1, 1)
        std = images.new_tensor(self.std, dtype=torch.float32).view(1, -1, 1, 1)
        return images.float().sub_(mean * self.scale).div_(std * self.scale)


@dataclass(frozen=True)
class CropFlip:
    """Random shifts and mirroring of whole batches: zero-pad by `pad`, crop back, flip left-right.

    The random numbers are drawn apart from their use: beside the data, from the sample ids, while the images
    may be augmented on the accelerator.

    Attributes:
        pad: The largest shift in pixels.
        flip: Whether half of the images are mirrored.
    """

    pad: int = 4
    flip: bool = True

    def draw(self, seed: int, sample_ids: list[int]) -> Tensor:
        """Draws `[B, 3]` int64: the crop's row and column in `0..2*pad` and 1 for mirroring."""
        places = 2 * self.pad + 1
        return random_integers(seed, sample_ids, (places, places, 2 if self.flip else 1))

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Applies `draws` `[B, 3]` to `images` `[B, C, H, W]` (any dtype), on the images' device."""
        count, channels, height, width = images.shape
        rows = torch.arange(height, device=images.device) + draws[:, :1]  # [B, H]
        columns = torch.arange(width, device=images.device)
        columns = torch.where(draws[:, 2:].bool(), columns.flip(0), columns) + draws[:, 1:2]  # [B, W]
        padded = pad(images, (self.pad,) * 4)
        stride = width + 2 * self.pad
        places = (rows[:, :, None] * stride + columns[:, None, :]).view(count, 1, height * width)
        picked = padded.flatten(2).gather(2, places.expand(-1, channels, -1))
        return picked.view(count, channels, height, width)


class ArrayImages(Dataset[tuple[Tensor, ...]]):
    """One split as tensors; a batch is one indexing operation.

    Args:
        images: All images `[N, C, H, W]` uint8.
        labels: Their classes `[N]` int64.
        normalization: Channel statistics, applied last.
        augment: Random shifts and mirroring; None for no augmentation.
        seed: The seed of the augmentation.
        on_device: Leaves augmentation and normalization to the accelerator: a batch is then `(uint8 images,
            labels, draws)` and `finish` completes it.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        normalization: Normalization,
        augment: CropFlip | None = None,
        seed: int = 0,
        on_device: bool = False,
    ) -> None:
        self.images = images
        self.labels = labels
        self.normalization = normalization
        self.augment = augment
        self.seed = seed
        self.on_device = on_device

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, sample_ids: list[int]) -> tuple[Tensor, ...]:
        """Returns the batch of `sample_ids`: float32 images and int64 labels, unless `on_device`."""
        chosen = torch.tensor(sample_ids, dtype=torch.int64) % len(self)
        images, labels = self.images[chosen], self.labels[chosen]
        draws = self.draws(sample_ids)
        if self.on_device:
            return images, labels, draws
        return finish(images, draws, self.normalization, self.augment), labels

    def __getitem__(self, sample_id: int) -> tuple[Tensor, ...]:
        """Returns one image and its label without the batch dimension."""
        return tuple(part[0] for part in self.__getitems__([sample_id]))

    def draws(self, sample_ids: list[int]) -> Tensor:
        """Returns the augmentation's random numbers `[B, 3]`, or `[B, 0]` where there is none."""
        if self.augment is None:
            return torch.empty(len(sample_ids), 0, dtype=torch.int64)
        return self.augment.draw(self.seed, sample_ids)


def finish(images: Tensor, draws: Tensor, normalization: Normalization, augment: CropFlip | None) -> Tensor:
    """Augments (where `draws` has columns) and normalizes `[B, C, H, W]` uint8 to float32."""
    if augment is not None and draws.shape[1]:
        images = augment(images, draws)
    return normalization(images)
