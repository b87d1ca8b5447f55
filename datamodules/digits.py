"""Real handwritten digits that need no download."""

import torch
from torch import Tensor

from lightning_n2uq.datamodules._data.arrays import CropFlip, Normalization
from lightning_n2uq.datamodules._data.base import Split
from lightning_n2uq.datamodules._data.in_memory import ArrayDataModule
from lightning_n2uq.datamodules._data.splits import stratified_split
from lightning_n2uq.utils.validation import check, check_integer

# Mean and standard deviation of all 1,797 images (population, pixels 0..16 divided by 16).
DIGITS_STATISTICS = Normalization(mean=(0.3053,), std=(0.3760,), scale=16.0)


class DigitsDataModule(ArrayDataModule):
    """The 1,797 8x8 single-channel digits of scikit-learn, 10 classes.

    They are the test part of the UCI "Optical Recognition of Handwritten Digits" set (Alpaydin and Kaynak,
    1998) and come inside scikit-learn. Splits are stratified and disjoint: 1,437 images for training, 180 for
    validation, 180 for the test with the default shares.

    Args:
        batch_size: Images per step and process.
        val_fraction: The share of the images for validation, in (0, 1).
        test_fraction: The share of the images for the test, in (0, 1).
        shift: The largest random shift of training images in pixels; 0 for no augmentation.
        seed: The seed of the order and the shifts.
        split_seed: The seed of the split, apart from `seed`: runs with several seeds share one test set.
        num_workers: Loader processes; 0 is the fastest.
        drop_last: Leaves out the last, smaller batch of a training epoch.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        shift: int = 1,
        seed: int = 0,
        split_seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            fits = 0 < value < 1 - (val_fraction + test_fraction - value)
            check(fits, name, value, "is above 0, with both shares together below 1")
        check_integer("shift", shift, 0, 4)
        super().__init__(
            normalization=DIGITS_STATISTICS,
            augmentation=CropFlip(pad=shift, flip=False) if shift else None,
            num_classes=10,
            in_channels=1,
            image_size=8,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            drop_last=drop_last,
        )
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.shift = shift
        self.split_seed = check_integer("split_seed", split_seed, 0)

    def load_arrays(self, split: Split) -> tuple[Tensor, Tensor]:
        """Returns the images `[N, 1, 8, 8]` uint8 with values 0..16 and labels `[N]` of one split."""
        images, labels = _load_digits()
        val, test = self.val_fraction, self.test_fraction
        parts = stratified_split(labels, (1 - val - test, val, test), self.split_seed)
        chosen = parts[("train", "val", "test").index(split)]
        return images[chosen], labels[chosen]


def _load_digits() -> tuple[Tensor, Tensor]:
    """Returns all images `[1797, 1, 8, 8]` uint8 with values 0..16, and labels `[1797]` int64."""
    from sklearn.datasets import load_digits  # here: importing scikit-learn takes half a second

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    return images, torch.from_numpy(bunch.target).to(torch.int64)
