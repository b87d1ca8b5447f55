"""Image files decoded and transformed as they are needed."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_n2uq.datamodules.arrays import Normalization
from lightning_n2uq.datamodules.decode import BrokenImageError, decode
from lightning_n2uq.datamodules.keyed import keyed_seed
from lightning_n2uq.datamodules.source import ImageSource

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], "Image"]


class FolderImages(Dataset[tuple[Tensor, Tensor]]):
    """One split of image files; a batch is decoded, transformed, stacked and then normalized as a whole.

    Random transforms must draw from torch's global generator, as torchvision's v2 transforms do: it is seeded
    from ``(seed, ticket)`` for each image and put back afterwards.

    Broken files are fatal, or with `skip_broken` recorded in `broken`. A training batch (`replace`) takes
    the next readable file instead, so that batches keep their size; an evaluation batch is smaller by them,
    so that no image counts twice.

    Args:
        source: where the files are.
        names: the files.
        labels: ``[N]`` int64.
        transform: Pillow image to Pillow image of the final size.
        normalization: channel statistics; their number is the number of channels.
        seed: seed of random transforms.
        skip_broken: go on without broken files.
        replace: take the next readable file in place of a broken one.
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
        """A file's name within the source."""
        return bytes(self._names[index]).decode()

    def broken_files(self) -> list[str]:
        """The broken files met so far, in any process."""
        return [self.source.where(self.name(index)) for index in self.broken.nonzero()[:, 0].tolist()]

    def __getitems__(self, tickets: list[int]) -> tuple[Tensor, Tensor]:
        """The batch of `tickets` (see `TicketSampler`): ``[B, C, H, W]`` float32 and ``[B]`` int64.

        Raises:
            BrokenImageError: a file is broken and fatal, or no file of the batch is readable.
        """
        pairs = [pair for ticket in tickets if (pair := self._load(ticket)) is not None]
        if not pairs:
            shown = ", ".join(self.broken_files()[:3])
            raise BrokenImageError(f"no readable image in a batch of {len(tickets)}; broken: {shown}")
        images = torch.stack([pixels for pixels, _ in pairs])
        return self.normalization(images), self.labels[[index for _, index in pairs]]

    def __getitem__(self, ticket: int) -> tuple[Tensor, Tensor]:
        """One image without the batch dimension."""
        images, labels = self.__getitems__([ticket])
        return images[0], labels[0]

    def _load(self, ticket: int) -> tuple[Tensor, int] | None:
        """Pixels ``[C, H, W]`` uint8 and index of the image to use for `ticket`, or None to leave it out."""
        first = ticket % len(self)
        for step in range(len(self) if self.replace else 1):
            index = (first + step) % len(self)
            if self.broken[index]:
                continue
            try:
                return self._pixels(index, ticket), index
            except BrokenImageError:
                if not self.skip_broken:
                    raise
                self.broken[index] = True
        return None

    def _pixels(self, index: int, ticket: int) -> Tensor:
        name, channels = self.name(index), len(self.normalization.mean)
        image = decode(self.source.read(name), self.source.where(name), channels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(self.seed, ticket))
            image = self.transform(image)
        width, height = image.size
        return torch.from_numpy(np.array(image).reshape(height, width, channels)).permute(2, 0, 1)
