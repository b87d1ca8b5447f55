"""Any data set that lies in one folder per class."""

import warnings
from typing import Any, Literal, cast

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_n2uq.datamodules._data import class_folders, split_record
from lightning_n2uq.datamodules._data.arrays import Normalization
from lightning_n2uq.datamodules._data.base import (
    DataNotFoundError,
    ImageDataModule,
    Split,
    existing_path,
)
from lightning_n2uq.datamodules._data.class_folders import Layout, find_layout
from lightning_n2uq.datamodules._data.folder_images import FolderImages, Transform, eval_transform
from lightning_n2uq.datamodules._data.image_files import ImageSource, below, open_source
from lightning_n2uq.utils.validation import check, check_choice, check_integer, check_number

# The statistics that the published ImageNet networks and torchvision's weights were trained with: mean and
# deviation of the ILSVRC-2012 training images' channels. For one channel: mean luma 0.299 R + 0.587 G +
# 0.114 B of the same means, and the three deviations' average.
IMAGENET_STATISTICS = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY_STATISTICS = Normalization((0.459,), (0.226,))

_CROP_SHARE = 224 / 256  # of the resized image's shorter side that the central crop keeps


class ImageFolderDataModule(ImageDataModule):
    """Images in one folder per class, with or without folders for the splits; also a .zip of these.

    - `<class>/*.jpg`: cut into training, validation and test, every class for itself (`val_fraction`,
      `test_fraction`, `split_seed`).
    - `train/<class>/`, `val/<class>/`, `test/<class>/`: read as they are. Without `val/` the training images
      are cut; without `test/` the validation images are the test images where there is a `val/`.

    Classes are numbered in the alphabetical order of their folders; a folder without images is no class.
    Training: random resized crop and mirroring. Evaluation: the shorter side to 256/224 of `image_size`, then
    the central crop. Greyscale, 16-bit, palette, CMYK, transparent and EXIF-rotated files are converted (see
    `decode`). A checkpoint keeps class names, counts and the split; a run that is resumed, or tested on
    images that were cut, has to find the same.

    Args:
        root: The folder or .zip; only the splits that a run uses have to be there.
        image_size: The height and width of the network's input in pixels.
        in_channels: 3, or 1 for greyscale.
        num_classes: The expected number of classes; None counts the class folders.
        classes: The class names in the order of their numbers, of which a split may lack some; None takes the
            folders, and for a trained network (`--ckpt_path`, `n2uq export --verify`) those that it knows.
        batch_size: Images per step and process; with fewer training images a batch is all of them.
        num_workers: Loader processes; None takes the available CPUs, at most 8.
        min_scale: The smallest share of an image's area that a random crop keeps, in (0, 1].
        augment: Crops and mirrors training images at random.
        on_broken: `error` stops at the first broken image file and names it; `skip` continues without it
            (training takes the next file instead) and warns of their number at the end.
        seed: The seed of order and augmentation.
        drop_last: Leaves out the last, smaller batch of a training epoch.
        val_fraction: The share of a class that is held out for validation, in (0, 1), where `root` has no
            `val/`; None is 0.1.
        test_fraction: The share of a class that is held out for the test, in [0, 1), where `root` has neither
            `val/` nor `test/`; None is 0.1, with 0 the validation images are the test images.
        split_seed: The seed of that cut, apart from `seed`: runs with several seeds share one test set.

    Raises:
        ValueError: An argument is out of range, or `num_classes` is not what is in `root`.
        DataNotFoundError: `root` is missing or holds none of the folders above.
    """

    complete = True
    """Whether every split is to have images of every class, and is named where it has not."""

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
        val_fraction: float | None = None,
        test_fraction: float | None = None,
        split_seed: int = 0,
    ) -> None:
        check(in_channels in (1, 3), "in_channels", in_channels, "are 1 (greyscale), 3 (RGB)")
        check_number("min_scale", min_scale, 0, 1, above=True)
        check_choice("on_broken", on_broken, ("error", "skip"))
        check_integer("image_size", image_size, 1)  # before a slow look at the folder
        self.root = root
        path = existing_path("root", root, "a folder with a folder of images per class, or a .zip of it")
        self.source: ImageSource = open_source(path)
        self.split_seed = check_integer("split_seed", split_seed, 0)
        self.asked = {"val_fraction": val_fraction, "test_fraction": test_fraction}
        self.layout = self.find_layout()
        self.empty: list[str] = []
        self._states: dict[Split, dict[str, Any]] = {}
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

    def find_layout(self) -> Layout:
        """Returns which folder each split is read from, and what is cut from it."""
        return find_layout(self.source, self.root, *self.asked.values())

    def find_classes(self, num_classes: int | None) -> list[str]:
        """Returns the classes in the order of their numbers: the folders of the first split there is."""
        found = class_folders.found_splits(self.source)
        folder = self.layout.folder if self.layout.shared else found[0]
        classes, self.empty = class_folders.classes_with_images(self.source, folder, found)
        allowed = f"is {len(classes)} (the folders with images in {self.root}/{folder})"
        check(num_classes in (None, len(classes)), "num_classes", num_classes, allowed)
        if not classes:
            raise DataNotFoundError(f"root: got {self.root!r}, whose class folders hold no images")
        return classes

    @property
    def class_names(self) -> list[str]:
        """The names of the class folders, in the order of their numbers."""
        return list(self.classes)

    @property
    def resize(self) -> int:
        """The length that evaluation resizes an image's shorter side to."""
        return round(self.image_size / _CROP_SHARE)

    def setup(self, stage: str | None = None) -> None:
        """Loads the splits that `stage` needs, and says what is in them and what is missing."""
        known = set(self.splits)
        super().setup(stage)
        for line in self._remarks(set(self.splits) - known):
            rank_zero_warn(line)
        if "train" in set(self.splits) - known:
            rank_zero_info(self._summary())

    def load_split(self, split: Split) -> FolderImages:
        """Returns one split, whose files are decoded batch by batch."""
        names, labels = self.files_of(split)
        training = split == "train"
        if training and self.augment:
            transform = train_transform(self.image_size, self.min_scale)
        else:
            transform = eval_transform(self.image_size, self.resize)
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

    def files_of(self, split: Split) -> tuple[list[str], Tensor]:
        """Returns the file names and labels `[N]` of a split."""
        layout = self.layout
        folder = layout.source_of(split, class_folders.found_splits(self.source))
        names, labels = self.list_split(folder)
        part: Split = "val" if split == "test" and split not in layout.shared else split
        if folder != layout.folder or part not in layout.shared:
            return names, labels
        parts = class_folders.cut_by_class(labels, layout.fractions, "test" in layout.shared, self.split_seed)
        chosen = parts[layout.shared.index(part)]
        if not len(chosen):
            raise ValueError(f"root: got {self.root!r}, with too few images to cut a {split} split from them")
        return [names[index] for index in chosen.tolist()], labels[chosen]

    def list_split(self, folder: str) -> tuple[list[str], Tensor]:
        """Returns the file names and labels `[N]` of the class folders in `folder`."""
        depth = 1 if folder else 0
        numbers = {name: number for number, name in enumerate(self.classes)}
        others = sorted(set(self.source.folders(folder)) - numbers.keys())
        unknown = [name for name in others if self.source.has_images(below(folder) + name)]
        if unknown:
            known = ", ".join(self.classes[:8]) + (", ..." if len(self.classes) > 8 else "")
            raise ValueError(
                f"root: got {self.root!r}, whose {folder or 'root'}/ has the unknown class {unknown[0]!r}; "
                f"allowed are {known}"
            )
        names = [name for name in self.source.images(folder) if name.count("/") > depth]
        if not names:
            raise DataNotFoundError(
                f"root: got {self.root!r}, which holds no images; expected {below(folder)}<class>/*.jpg"
            )
        return names, torch.tensor([numbers[name.split("/")[depth]] for name in names])

    def _check_batch_size(self, count: int) -> None:
        """Takes all training images of a process as a batch where there are fewer than `batch_size`."""
        share = -(-count // self._processes()[0])
        if self.batch_size > share:
            rank_zero_warn(
                f"batch_size: got {self.batch_size}, the training split has {count} images: "
                f"a batch has {share}"
            )
            self.batch_size = share

    def _remarks(self, new: set[Split]) -> list[str]:
        lines = [class_folders.empty_classes(self.empty)] if self.empty else []
        for split in sorted(new) if self.complete else ():
            counts = split_record.counts_of(self.splits[split], len(self.classes))
            if line := class_folders.missing_classes(split, counts, self.classes):
                lines.append(line)
        for name, share in self.asked.items():
            part = name.partition("_")[0]
            if share is not None and part not in self.layout.shared and not (part == "test" and not share):
                lines.append(f"{name}: got {share}, not used: {self.root!r} has folders for its splits")
        return lines

    def _summary(self) -> str:
        counts = {split: part["counts"] for split, part in self.split_state().items()}
        how = "as its folders are"
        if self.layout.shared:
            val, test = self.layout.fractions
            how = f"cut with val_fraction {val:g}, test_fraction {test:g}, split_seed {self.split_seed}"
        title = f"data: {self.root}, {len(self.classes)} classes, {how}"
        return f"{title}\n{class_folders.table(self.classes, counts)}"

    def split_state(self) -> dict[str, dict[str, Any]]:
        """Returns for every split that is loaded, or cut, its counts by class and a digest of its files."""
        for split in class_folders.SPLITS:
            if split in self._states:
                continue
            if split in self.splits:
                self._states[split] = split_record.state_of(self.splits[split], len(self.classes))
            elif split in self.layout.shared and self.splits:
                self._states[split] = split_record.state_of_files(*self.files_of(split), len(self.classes))
        return {split: self._states[split] for split in class_folders.SPLITS if split in self._states}

    def state_dict(self) -> dict[str, Any]:
        """Returns class names, preprocessing and splits, for the checkpoint."""
        return {**super().state_dict(), split_record.KEY: self.split_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compares class names and splits with a checkpoint's.

        Raises:
            ValueError: Classes are others, a resumed run would train on other images, or images that were cut
                would be cut in another way.
        """
        super().load_state_dict(state_dict)
        saved = state_dict.get(split_record.KEY) or {}
        if self.layout.shared or "train" in self.splits:
            split_record.check_same(saved, self.split_state(), self.root, cut=bool(self.layout.shared))

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
