"""Base of the data modules whose images fit into memory."""

import warnings
from abc import abstractmethod

from torch import Tensor

from lightning_n2uq.datamodules.arrays import ArrayImages, CropFlip, Normalization, finish
from lightning_n2uq.datamodules.base import ImageDataModule, Split


class ArrayDataModule(ImageDataModule):
    """Batches are cut out of one uint8 tensor per split; loader processes would only slow that down.

    Args:
        normalization: channel statistics.
        augmentation: random shifts and mirroring of training images, or None.
        augment_on_device: send uint8 images and the augmentation's draws to the accelerator and finish them
            there (`on_after_batch_transfer`): a quarter of the bytes, no arithmetic on the CPU, the same
            pixels.
        num_classes: see the base class, as everything that follows.
        in_channels: channels of an image.
        image_size: height and width in pixels.
        batch_size: images per step and process.
        num_workers: loader processes; 0 is the fastest.
        seed: seed of order and augmentation.
        drop_last: leave out the last, smaller batch of a training epoch.
    """

    def __init__(
        self,
        *,
        normalization: Normalization,
        augmentation: CropFlip | None,
        augment_on_device: bool = False,
        num_classes: int,
        in_channels: int,
        image_size: int,
        batch_size: int,
        num_workers: int,
        seed: int,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            in_channels=in_channels,
            image_size=image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            drop_last=drop_last,
        )
        self.normalization = normalization
        self.augmentation = augmentation
        self.augment_on_device = augment_on_device

    @abstractmethod
    def load_arrays(self, split: Split) -> tuple[Tensor, Tensor]:
        """Images ``[N, C, H, W]`` uint8 and labels ``[N]`` int64 of one split."""

    def load_split(self, split: Split) -> ArrayImages:
        """One split; only training images are augmented."""
        images, labels = self.load_arrays(split)
        augment = self.augmentation if split == "train" else None
        return ArrayImages(images, labels, self.normalization, augment, self.seed, self.augment_on_device)

    def setup(self, stage: str | None = None) -> None:
        """See the base class; also silences Lightning's advice to add workers, which is wrong for these."""
        super().setup(stage)
        warnings.filterwarnings("ignore", ".*does not have many workers which may be a bottleneck.*")

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, ...] | list[Tensor], dataloader_idx: int
    ) -> tuple[Tensor, ...] | list[Tensor]:
        """Augments and normalizes a batch that arrived as ``(uint8 images, labels, draws)``."""
        if not self.augment_on_device or len(batch) != 3:
            return batch
        images, labels, draws = batch
        return finish(images, draws, self.normalization, self.augmentation), labels
