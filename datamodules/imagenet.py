"""ImageNet (ILSVRC-2012)."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_n2uq.datamodules._data.base import DataNotFoundError
from lightning_n2uq.datamodules._data.class_folders import Layout
from lightning_n2uq.datamodules._data.imagenet_labels import read_class_index, read_val_labels
from lightning_n2uq.datamodules.image_folder import ImageFolderDataModule

NUM_CLASSES = 1000
_LABEL_FILES = ("LOC_val_solution.csv", "val.txt")


class ImageNetDataModule(ImageFolderDataModule):
    """ILSVRC-2012 (Russakovsky et al., IJCV 2015), 1,000 classes: `train/<wnid>/`, `val/<wnid>/`.

    `val/` may be flat, as the official archive unpacks, when a table of its labels is there. Classes are
    numbered in the alphabetical order of their WordNet ids, as published networks do; a folder that holds
    only some of them needs the class index file. The validation images are also the test images, since the
    labels of the real test images are not public.

    Args:
        root: The folder or .zip with `train` and `val`.
        class_index: The path of `imagenet_class_index.json`; None looks for it in `root`, and does without it
            where all 1,000 class folders are there.
        val_labels: The table of a flat `val/`, with a file name and a WordNet id or number per line; None
            looks for `LOC_val_solution.csv` and `val.txt` in `root`.
        image_size: The height and width of the network's input in pixels.
        batch_size: Images per step and process.
        num_workers: Loader processes; None takes the available CPUs, at most 8.
        min_scale: The smallest share of an image's area that a random crop keeps, in (0, 1].
        augment: Crops and mirrors training images at random.
        on_broken: `error` stops at the first broken image file and names it; `skip` continues without it
            (training takes the next file instead) and warns of their number at the end.
        seed: The seed of order and augmentation.
        drop_last: Leaves out the last, smaller batch of a training epoch.

    Raises:
        ValueError: An argument is out of range.
        DataNotFoundError: `root` is missing, or does not say which class has which number.
    """

    complete = False  # of 1,000 classes a folder may hold some

    def __init__(
        self,
        root: str,
        class_index: str | None = None,
        val_labels: str | None = None,
        image_size: int = 224,
        batch_size: int = 64,
        num_workers: int | None = None,
        min_scale: float = 0.08,
        augment: bool = True,
        on_broken: Literal["error", "skip"] = "error",
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.class_index = class_index
        self.val_labels = val_labels
        super().__init__(
            root=root,
            image_size=image_size,
            in_channels=3,
            num_classes=NUM_CLASSES,
            batch_size=batch_size,
            num_workers=num_workers,
            min_scale=min_scale,
            augment=augment,
            on_broken=on_broken,
            seed=seed,
            drop_last=drop_last,
        )

    def find_layout(self) -> Layout:
        """Returns that every split has a folder of its own."""
        return Layout()

    def find_classes(self, num_classes: int | None) -> list[str]:
        """Returns the 1,000 WordNet ids: from the class index file, else from the class folders."""
        index = self.class_index or self._beside(("imagenet_class_index.json",))
        if index is not None:
            return read_class_index(index, NUM_CLASSES)
        found = max((self.source.folders(split) for split in ("train", "val")), key=len)
        if len(found) != NUM_CLASSES:
            raise DataNotFoundError(
                f"root: got {self.root!r}, which has {len(found)} class folders in train/ or val/; expected"
                f" {NUM_CLASSES}, or imagenet_class_index.json in it or as class_index"
            )
        return found

    def list_split(self, folder: str) -> tuple[list[str], Tensor]:
        """Returns file names and labels `[N]`; a flat `val/` takes its labels from a table."""
        names = [] if folder != "val" or self.source.folders(folder) else self.source.images(folder)
        if not names:
            return super().list_split(folder)
        table = self.val_labels or self._beside(_LABEL_FILES)
        if table is None:
            raise DataNotFoundError(
                f"val_labels: got None, and {self.root!r} holds neither {' nor '.join(_LABEL_FILES)};"
                " expected a table, since val/ has no class folders"
            )
        labels = read_val_labels(table, self.classes)
        missing = next((name for name in names if Path(name).stem not in labels), None)
        if missing is not None:
            raise ValueError(f"val_labels: got {table!r}, which has no line for {missing}")
        return names, torch.tensor([labels[Path(name).stem] for name in names])

    def _beside(self, names: tuple[str, ...]) -> str | None:
        """Returns the first of `names` that is a file in `root` (not in an archive)."""
        files = [Path(self.root).expanduser() / name for name in names]
        return next((str(file) for file in files if file.is_file()), None)
