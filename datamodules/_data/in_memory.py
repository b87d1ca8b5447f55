"""Base of the data modules whose images fit into memory."""

import warnings
from abc import abstractmethod
from typing import Any

from torch import Tensor

from lightning_n2uq.datamodules._data.arrays import ArrayImages, CropFlip, Normalization, finish
from lightning_n2uq.datamodules._data.base import ImageDataModule, Split


class ArrayDataModule(ImageDataModule):
    """Batches are cut out of one uint8 tensor per split; loader processes would only slow that down.

    Args:
        normalization: Channel statistics.
        augmentation: Random shifts and mirroring of training images; None for no augmentation.
        augment_on_device: Sends uint8 images and the augmentation's random numbers to the accelerator and
            finishes them there (`on_after_batch_transfer`): a quarter of the bytes, the same pixels.
        base: The arguments of `ImageDataModule`.
    """

    def __init__(
        self,
        *,
        normalization: Normalization,
        augmentation: CropFlip | None,
        augment_on_device: bool = False,
        **base: Any,  # noqa: ANN401  # subclasses name every argument
    ) -> None:
        super().__init__(**base)
        self.normalization = normalization
        self.augmentation = augmentation
        self.augment_on_device = augment_on_device

    @abstractmethod
    def load_arrays(self, split: Split) -> tuple[Tensor, Tensor]:
        """Returns the images `[N, C, H, W]` uint8 and labels `[N]` int64 of one split."""

    def load_split(self, split: Split) -> ArrayImages:
        """Returns one split; only training images are augmented."""
        images, labels = self.load_arrays(split)
        augment = self.augmentation if split == "train" else None
        return ArrayImages(images, labels, self.normalization, augment, self.seed, self.augment_on_device)

    def setup(self, stage: str | None = None) -> None:
        """Loads the splits; silences Lightning's advice to add workers, which is wrong for arrays."""
        super().setup(stage)
        warnings.filterwarnings("ignore", ".*does not have many workers which may be a bottleneck.*")

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, ...] | list[Tensor], dataloader_idx: int
    ) -> tuple[Tensor, ...] | list[Tensor]:
        """Augments and normalizes a batch that arrived as `(uint8 images, labels, draws)`."""
        if not self.augment_on_device or len(batch) != 3:
            return batch
        images, labels, draws = batch
        return finish(images, draws, self.normalization, self.augmentation), labels
