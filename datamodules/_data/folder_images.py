"""Image files decoded and transformed as they are needed."""

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_n2uq.datamodules._data.arrays import Normalization
from lightning_n2uq.datamodules._data.counter_rng import generator_seed
from lightning_n2uq.datamodules._data.decode import BrokenImageError, decode
from lightning_n2uq.datamodules._data.image_files import ImageSource

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], "Image"]


class FolderImages(Dataset[tuple[Tensor, Tensor]]):
    """One split of image files; a batch is decoded, transformed, stacked and then normalized as a whole.

    Random transforms must draw from torch's global generator, as torchvision's v2 transforms do: it is seeded
    from `(seed, sample id)` for each image and restored afterwards.

    Broken files are fatal, or with `skip_broken` recorded in `broken`. A training batch (`replace`) takes
    the next readable file instead, so that batches keep their size; an evaluation batch is smaller by them,
    so that no image counts twice.

    Args:
        source: The folder or archive of the files.
        names: The files within the source.
        labels: Their classes `[N]` int64.
        transform: Turns a Pillow image into one of the final size.
        normalization: Channel statistics; their number is the number of channels.
        seed: The seed of random transforms.
        skip_broken: Continues without broken files.
        replace: Takes the next readable file in place of a broken one.
    """

    def __init__(
        self,
        source: ImageSource,
        names: list[str],
        labels: Tensor,
        transform: Transform,
        normalization: Normalization,
        seed: int = 0,
        skip_broken: bool = False,
        replace: bool = False,
    ) -> None:
        # As bytes in one array: a list of a million strings would be copied page by page into every loader
        # process as its reference counts change.
        self._names = np.array([name.encode() for name in names], dtype=np.bytes_)
        self.source = source
        self.labels = labels
        self.transform = transform
        self.normalization = normalization
        self.seed = seed
        self.skip_broken = skip_broken
        self.replace = replace
        self.broken: Tensor = torch.zeros(len(names), dtype=torch.bool)
        self.broken.share_memory_()  # type: ignore[no-untyped-call]  # loader processes write it

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Returns a file's name within the source."""
        return bytes(self._names[index]).decode()

    def broken_files(self) -> list[str]:
        """Returns the broken files that any process has met so far."""
        return [self.source.where(self.name(index)) for index in self.broken.nonzero()[:, 0].tolist()]

    def __getitems__(self, sample_ids: list[int]) -> tuple[Tensor, Tensor]:
        """Returns the batch of `sample_ids`: images `[B, C, H, W]` float32 and labels `[B]` int64.

        Raises:
            BrokenImageError: A file is broken and fatal, or no file of the batch is readable.
        """
        pairs = [pair for sample_id in sample_ids if (pair := self._load(sample_id)) is not None]
        if not pairs:
            shown = ", ".join(self.broken_files()[:3])
            raise BrokenImageError(f"no readable image in a batch of {len(sample_ids)}; broken: {shown}")
        images = torch.stack([pixels for pixels, _ in pairs])
        return self.normalization(images), self.labels[[index for _, index in pairs]]

    def __getitem__(self, sample_id: int) -> tuple[Tensor, Tensor]:
        """Returns one image and its label without the batch dimension."""
        images, labels = self.__getitems__([sample_id])
        return images[0], labels[0]

    def _load(self, sample_id: int) -> tuple[Tensor, int] | None:
        """Returns the pixels `[C, H, W]` uint8 and the index of the image to use, or None to leave it out."""
        first = sample_id % len(self)
        for step in range(len(self) if self.replace else 1):
            index = (first + step) % len(self)
            if self.broken[index]:
                continue
            try:
                return self._pixels(index, sample_id), index
            except BrokenImageError:
                if not self.skip_broken:
                    raise
                self.broken[index] = True
        return None

    def _pixels(self, index: int, sample_id: int) -> Tensor:
        name, channels = self.name(index), len(self.normalization.mean)
        image = decode(self.source.read(name), self.source.where(name), channels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_seed(self.seed, sample_id))
            image = self.transform(image)
        width, height = image.size
        return torch.from_numpy(np.array(image).reshape(height, width, channels)).permute(2, 0, 1)


def eval_transform(size: int, resize: int | None) -> Transform:
    """Returns the resize of the shorter side, if there is one, and the central crop of `size`."""
    from torchvision.transforms import v2  # here: importing torchvision takes a second

    crop = v2.CenterCrop(size)
    return cast(Transform, crop if resize is None else v2.Compose([v2.Resize(resize), crop]))
