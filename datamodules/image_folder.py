"""Any data set that lies in one folder per class."""

import warnings
from typing import Literal, cast

import torch
from torch import Tensor

from lightning_n2uq.datamodules._data.arrays import Normalization
from lightning_n2uq.datamodules._data.base import (
    DataNotFoundError,
    ImageDataModule,
    Split,
    existing_path,
)
from lightning_n2uq.datamodules._data.folder_images import FolderImages, Transform
from lightning_n2uq.datamodules._data.image_files import ImageSource, open_source
from lightning_n2uq.utils.validation import check, check_choice, check_integer, check_number

# The statistics that the published ImageNet networks and torchvision's weights were trained with: mean and
# deviation of the ILSVRC-2012 training images' channels. For one channel: mean luma 0.299 R + 0.587 G +
# 0.114 B of the same means, and the three deviations' average.
IMAGENET_STATISTICS = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY_STATISTICS = Normalization((0.459,), (0.226,))

_CROP_SHARE = 224 / 256  # of the resized image's shorter side that the central crop keeps


class ImageFolderDataModule(ImageDataModule):
    """Images in `train/<class>/`, `val/<class>/` and optionally `test/<class>/`; also a .zip of these.

    Classes are numbered in the alphabetical order of their folders. Training: random resized crop and
    mirroring. Evaluation: the shorter side to 256/224 of `image_size`, then the central crop. Without
    `test/` the validation images are the test images. Greyscale, 16-bit, palette, CMYK, transparent and
    EXIF-rotated files are converted (see `decode`).

    Args:
        root: The folder or .zip; only the splits that a run uses have to be there.
        image_size: The height and width of the network's input in pixels.
        in_channels: 3, or 1 for greyscale.
        num_classes: The expected number of classes; None counts the class folders.
        classes: The class names in the order of their numbers, of which a split may lack some; None takes the
            folders, and for a trained network (`--ckpt_path`, `n2uq export --verify`) those that it knows.
        batch_size: Images per step and process.
        num_workers: Loader processes; None takes the available CPUs, at most 8.
        min_scale: The smallest share of an image's area that a random crop keeps, in (0, 1].
        augment: Crops and mirrors training images at random.
        on_broken: `error` stops at the first broken image file and names it; `skip` continues without it
            (training takes the next file instead) and warns of their number at the end.
        seed: The seed of order and augmentation.
        drop_last: Leaves out the last, smaller batch of a training epoch.

    Raises:
        ValueError: An argument is out of range, or `num_classes` is not what is in `root`.
        DataNotFoundError: `root` is missing or holds none of the folders above.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        in_channels: int = 3,
        num_classes: int | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        min_scale: float = 0.08,
        augment: bool = True,
        on_broken: Literal["error", "skip"] = "error",
        seed: int = 0,
        drop_last: bool = False,
        classes: list[str] | None = None,
    ) -> None:
        check(in_channels in (1, 3), "in_channels", in_channels, "are 1 (greyscale), 3 (RGB)")
        check_number("min_scale", min_scale, 0, 1, above=True)
        check_choice("on_broken", on_broken, ("error", "skip"))
        check_integer("image_size", image_size, 1)  # before a slow look at the folder
        self.root = root
        path = existing_path("root", root, "a folder with train/<class>/ and val/<class>/, or a .zip of it")
        self.source: ImageSource = open_source(path)
        self.classes = self.find_classes(num_classes) if classes is None else given_classes(classes)
        check(num_classes in (None, len(self.classes)), "num_classes", num_classes, f"is {len(self.classes)}")
        super().__init__(
            num_classes=len(self.classes),
            in_channels=in_channels,
            image_size=image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            drop_last=drop_last,
        )
        self.min_scale = min_scale
        self.augment = augment
        self.on_broken = on_broken
        self.normalization = IMAGENET_STATISTICS if in_channels == 3 else GREY_STATISTICS

    def find_classes(self, num_classes: int | None) -> list[str]:
        """Returns the classes in the order of their numbers: the folders of the first split there is."""
        for split in ("train", "val", "test"):
            classes = self.source.folders(split)
            if classes:
                allowed = f"is {len(classes)} (the folders in {split}/)"
                check(num_classes in (None, len(classes)), "num_classes", num_classes, allowed)
                return classes
        raise DataNotFoundError(
            f"root: got {self.root!r}, which holds no train/<class>/, val/<class>/ or test/<class>/ folder"
        )

    @property
    def class_names(self) -> list[str]:
        """The names of the class folders, in the order of their numbers."""
        return list(self.classes)

    def load_split(self, split: Split) -> FolderImages:
        """Returns one split, whose files are decoded batch by batch."""
        folder = "val" if split == "test" and not self.source.folders("test") else split
        names, labels = self.list_split(folder)
        training = split == "train"
        if training and self.augment:
            transform = train_transform(self.image_size, self.min_scale)
        else:
            transform = eval_transform(self.image_size)
        return FolderImages(
            self.source,
            names,
            labels,
            transform,
            self.normalization,
            seed=self.seed,
            skip_broken=self.on_broken == "skip",
            replace=training,
        )

    def list_split(self, folder: str) -> tuple[list[str], Tensor]:
        """Returns the file names and labels `[N]` of the class folders in `folder`."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        unknown = sorted(set(self.source.folders(folder)) - numbers.keys())
        if unknown:
            known = ", ".join(self.classes[:8]) + (", ..." if len(self.classes) > 8 else "")
            raise ValueError(
                f"root: got {self.root!r}, whose {folder}/ has the unknown class {unknown[0]!r}; "
                f"allowed are {known}"
            )
        names = [name for name in self.source.images(folder) if name.count("/") > 1]
        if not names:
            raise DataNotFoundError(
                f"root: got {self.root!r}, which holds no images; expected {folder}/<class>/*.jpg"
            )
        return names, torch.tensor([numbers[name.split("/")[1]] for name in names])

    def teardown(self, stage: str | None = None) -> None:
        """Warns once per split of the number and the first names of the broken files that were skipped."""
        for split, dataset in self.splits.items():
            files = dataset.broken_files()  # type: ignore[attr-defined]
            if files:
                shown = ", ".join(files[:5]) + (", ..." if len(files) > 5 else "")
                message = f"on_broken=skip: {len(files)} broken image files in the {split} split: {shown}"
                warnings.warn(message, stacklevel=2)


def given_classes(names: list[str]) -> list[str]:
    """Returns class names that are given rather than found.

    Raises:
        ValueError: There are none, or one occurs twice.
    """
    check(len(set(names)) == len(names) > 0, "classes", names, "are one or more different names")
    return list(names)


def train_transform(size: int, min_scale: float) -> Transform:
    """Returns a random crop of `min_scale` to all of the area, aspect 3/4 to 4/3, mirrored at random."""
    from torchvision.transforms import v2  # here: importing torchvision takes a second

    crop = v2.RandomResizedCrop(size, scale=(min_scale, 1.0))
    return cast(Transform, v2.Compose([crop, v2.RandomHorizontalFlip()]))


def eval_transform(size: int) -> Transform:
    """Returns a resize of the shorter side to 256/224 of `size` and a central crop."""
    from torchvision.transforms import v2

    resize = v2.Resize(round(size / _CROP_SHARE))
    return cast(Transform, v2.Compose([resize, v2.CenterCrop(size)]))
