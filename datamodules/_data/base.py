"""What the image data modules share: shapes known at construction, class names, one-line errors."""

from pathlib import Path
from typing import Any

from lightning_n2uq.datamodules._data.arrays import Normalization
from lightning_n2uq.datamodules._data.loading import Split, SplitDataModule
from lightning_n2uq.utils import preprocessing as kept
from lightning_n2uq.utils.class_names import KEY, check_class_names
from lightning_n2uq.utils.preprocessing import Preprocessing
from lightning_n2uq.utils.validation import check_integer

__all__ = ["DataNotFoundError", "ImageDataModule", "Split", "existing_path"]


class DataNotFoundError(FileNotFoundError, ValueError):
    """A file or folder that an argument names is not there; the message is one line."""


class ImageDataModule(SplitDataModule):
    """Base of the image classification data modules.

    A batch is `(images [B, C, H, W] float32, labels [B] int64)`.

    Reproducibility: the order of epoch `e` follows from `(seed, e)` and the augmentation of an image from
    `(seed, e, image)`. Both are the same for any number of workers, and a run resumed from a checkpoint (also
    one written in the middle of an epoch) sees what an uninterrupted run sees. Several processes share one
    order, so the augmentation of an image does not depend on their number.

    Args:
        num_classes: The number of classes.
        in_channels: The channels of an image.
        image_size: The height and width of an image in pixels.
        batch_size: Images per step and process.
        num_workers: Loader processes, at most 8 per processor (or 64); None chooses from the available CPUs.
        seed: The seed of splits, order and augmentation.
        drop_last: Leaves out the last, smaller batch of a training epoch.

    Raises:
        ValueError: An argument is out of range.
    """

    samples = "images"

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        batch_size: int,
        num_workers: int | None,
        seed: int,
        drop_last: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, drop_last=drop_last)
        self.num_classes = check_integer("num_classes", num_classes, 1)
        self.in_channels = check_integer("in_channels", in_channels, 1)
        self.image_size = check_integer("image_size", image_size, 1)

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes in the order of their numbers; None where the data has none."""
        return None

    @property
    def resize(self) -> int | None:
        """The length that evaluation resizes an image's shorter side to; None where it does not."""
        return None

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What evaluation does to an image file; None where the images are no files."""
        used: Normalization | None = getattr(self, "normalization", None)
        if used is None:
            return None
        return Preprocessing(self.in_channels, self.resize, self.image_size, used.mean, used.std, used.scale)

    def state_dict(self) -> dict[str, Any]:
        """Returns class names and preprocessing, for the checkpoint.

        `test` and `export` match classes by name, `predict` and `export` prepare images as the network knows
        them.
        """
        names, steps = self.class_names, self.preprocessing
        state: dict[str, Any] = {} if names is None else {KEY: names}
        return state if steps is None else {**state, kept.KEY: steps.as_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compares the class names with a checkpoint's.

        Raises:
            ValueError: They are others, or in another order: labels would be shifted.
        """
        saved, names = state_dict.get(KEY), self.class_names
        if saved is not None and names is not None:
            check_class_names(saved, names, "data")

    def sample_bytes(self) -> int:
        """Returns the size of an image in float32."""
        return 4 * self.in_channels * self.image_size * self.image_size


def existing_path(name: str, value: str | Path, expected: str) -> Path:
    """Returns `value` as a path, with `~` expanded.

    Raises:
        DataNotFoundError: Nothing is there; the message names the argument, the value and what is expected.
    """
    path = Path(value).expanduser()
    if not path.exists():
        raise DataNotFoundError(f"{name}: got {str(value)!r}, which does not exist; expected {expected}")
    return path
