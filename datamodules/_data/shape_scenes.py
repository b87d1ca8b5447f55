"""Base of the data modules whose images are made-up scenes of shapes."""

from __future__ import annotations

from lightning_n2uq.datamodules._data.base import ImageDataModule
from lightning_n2uq.datamodules._data.counter_rng import generator_seed
from lightning_n2uq.datamodules._data.loading import Split
from lightning_n2uq.datamodules._data.shapes import CLASS_NAMES, Scenes, draw_scenes
from lightning_n2uq.utils.validation import check_integer

SPLITS: tuple[Split, ...] = ("train", "val", "test")


class ShapeScenesDataModule(ImageDataModule):
    """Discs, squares and crosses on noise; all of it follows from `seed`.

    Args:
        image_size: The height and width of an image in pixels, 16 at least.
        num_train: The number of training images.
        num_val: The number of validation images.
        num_test: The number of test images.
        max_objects: The largest number of objects in an image.
        batch_size: Images per step and process.
        seed: The seed of images and order.
        num_workers: Loader processes; 0 is the fastest.
        drop_last: Leaves out the last, smaller batch of a training epoch.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        image_size: int = 64,
        num_train: int = 512,
        num_val: int = 64,
        num_test: int = 64,
        max_objects: int = 3,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            num_classes=len(CLASS_NAMES),
            in_channels=3,
            image_size=check_integer("image_size", image_size, 16),
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            drop_last=drop_last,
        )
        self.sizes = dict(zip(SPLITS, (num_train, num_val, num_test), strict=True))
        for split, count in self.sizes.items():
            check_integer(f"num_{split}", count, 1)
        self.max_objects = check_integer("max_objects", max_objects, 1)

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes, the background first."""
        return list(CLASS_NAMES)

    def scenes(self, split: Split) -> Scenes:
        """Draws the images of one split."""
        seed = generator_seed(self.seed, SPLITS.index(split))
        return draw_scenes(self.sizes[split], self.image_size, self.max_objects, seed)
