"""What CIFAR-10 and CIFAR-100 share: two sources, splits, cache."""

import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_n2uq.datamodules._data.arrays import CropFlip, Normalization
from lightning_n2uq.datamodules._data.base import DataNotFoundError, Split, existing_path
from lightning_n2uq.datamodules._data.cache import default_cache_dir, load_decoded
from lightning_n2uq.datamodules._data.image_files import ImageSource, open_source
from lightning_n2uq.datamodules._data.in_memory import ArrayDataModule
from lightning_n2uq.datamodules._data.splits import stratified_split
from lightning_n2uq.utils.class_names import check_class_names
from lightning_n2uq.utils.validation import check, check_integer, check_number

_SIZE = 32


class CIFARDataModule(ArrayDataModule):
    """Base of the CIFAR data modules (Krizhevsky, 2009): 50,000 training and 10,000 test images of 32x32 RGB.

    `root` is one of

    - a folder with the official pickles (`cifar-10-batches-py` or `cifar-100-python`), which torchvision
      downloads and verifies;
    - a folder with `train/<class>/*` and `test/<class>/*` image files;
    - a .zip of such a folder, read in place.

    Image files are decoded once and kept as uint8 arrays in a cache on disk. Training images are
    zero-padded by 4 pixels, cropped back at random and mirrored at random, a batch at a time.

    Args:
        root: The folder or .zip.
        batch_size: Images per step and process.
        val_fraction: The stratified share of the training images held out for validation, in [0, 1). With 0
            the network trains on all and validates on the test images, as in most papers' tables.
        train_fraction: The stratified share of the remaining training images to use, in (0, 1].
        augment: Crops and mirrors training images at random.
        augment_on_device: Augments and normalizes on the accelerator; the pixels are the same.
        download: Fetches the official pickles into `root` where they are missing.
        cache: Keeps decoded image files on disk.
        cache_dir: The folder of the cache; None takes `$XDG_CACHE_HOME/lightning_n2uq` or
            `~/.cache/lightning_n2uq`.
        seed: The seed of order and augmentation.
        split_seed: The seed of the splits, apart from `seed` so that runs with several seeds share one split.
        num_workers: Loader processes; 0 is the fastest.
        drop_last: Leaves out the last, smaller batch of a training epoch.

    Raises:
        ValueError: An argument is out of range.
        DataNotFoundError: (in `prepare_data` or `setup`) `root` holds none of the above.
    """

    classes: ClassVar[int]
    statistics: ClassVar[Normalization]
    pickles: ClassVar[str]  # the official folder's name
    torchvision_name: ClassVar[str]

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        val_fraction: float = 0.1,
        train_fraction: float = 1.0,
        augment: bool = True,
        augment_on_device: bool = False,
        download: bool = False,
        cache: bool = True,
        cache_dir: str | None = None,
        seed: int = 0,
        split_seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            normalization=self.statistics,
            augmentation=CropFlip(pad=4, flip=True) if augment else None,
            augment_on_device=augment_on_device,
            num_classes=self.classes,
            in_channels=3,
            image_size=_SIZE,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            drop_last=drop_last,
        )
        self.root = root
        self.val_fraction = check_number("val_fraction", val_fraction, 0, 1, below=True)
        self.train_fraction = check_number("train_fraction", train_fraction, 0, 1, above=True)
        self.download = download
        self.cache_dir = (Path(cache_dir) if cache_dir else default_cache_dir()) if cache else None
        self.split_seed = check_integer("split_seed", split_seed, 0)
        self._read: dict[str, tuple[Tensor, Tensor]] = {}
        self._source: ImageSource | None = None
        self._names: list[str] | None = None

    @property
    def class_names(self) -> list[str] | None:
        """The class folders' names; None before they are read, and for the official pickles."""
        return self._names

    def official(self, train: bool, download: bool) -> Any:  # noqa: ANN401  # torchvision has no types
        """Returns torchvision's data set of the official pickles, with `data` and `targets`."""
        from torchvision import datasets  # here: importing torchvision takes a second

        root = str(Path(self.root).expanduser())
        return getattr(datasets, self.torchvision_name)(root, train=train, download=download)

    def prepare_data(self) -> None:
        """Downloads on request, and decodes image files into the cache once for all processes."""
        if self.download and not self._has_image_files():
            self._download()
        elif self.cache_dir is not None and self._has_image_files():
            self._read_split("train")
            self._read_split("test")

    def setup(self, stage: str | None = None) -> None:
        """Loads the splits that `stage` needs."""
        super().setup(stage)
        self._read.clear()  # training and validation are cut from one array, which is not needed any more
        self._source = None

    def load_arrays(self, split: Split) -> tuple[Tensor, Tensor]:
        """Returns the images `[N, 3, 32, 32]` uint8 and labels `[N]` of one split."""
        if split == "test" or (split == "val" and self.val_fraction == 0):
            return self._official_split("test")
        images, labels = self._official_split("train")
        share = (1 - self.val_fraction) * self.train_fraction
        # The held-out part comes first: it does not change with `train_fraction`.
        fractions = (self.val_fraction, share) if self.val_fraction else (share,)
        chosen = stratified_split(labels, fractions, self.split_seed)[0 if split == "val" else -1]
        if len(chosen) == len(labels):
            return images, labels
        return images[chosen], labels[chosen]

    def _has_image_files(self) -> bool:
        root = Path(self.root).expanduser()
        return root.is_file() or ((root / "train").is_dir() and (root / "test").is_dir())

    def _download(self) -> None:
        try:
            self.official(train=True, download=True)
        except (OSError, RuntimeError) as error:  # no network, no room, or a file that does not verify
            raise DataNotFoundError(f"download: got True, failed for root {self.root!r}: {error}") from error

    def _official_split(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns the 50,000 training or 10,000 test images with their labels."""
        if name not in self._read:
            self._read[name] = self._read_split(name)
        return self._read[name]

    def _read_split(self, name: str) -> tuple[Tensor, Tensor]:
        expected = (
            f"a folder with {self.pickles}/ (set download: true to fetch it), a folder with train/<class>/"
            " and test/<class>/ image files, or a .zip of one"
        )
        root = existing_path("root", self.root, expected)
        if self._has_image_files():
            return self._from_files(root, name)
        if not (root / self.pickles).is_dir():
            raise DataNotFoundError(f"root: got {self.root!r}, which holds no data; expected {expected}")
        return self._from_pickles(name)

    def _from_files(self, root: Path, split: str) -> tuple[Tensor, Tensor]:
        source = self._source = self._source or open_source(root)
        classes = source.folders(split)
        allowed = f"are {self.classes} class folders in {split}/, there are {len(classes)}"
        check(len(classes) == self.classes, "root", self.root, allowed)
        if self._names is not None:
            check_class_names(self._names, classes, "root")
        self._names = classes
        names = source.images(split)
        numbers = {name: number for number, name in enumerate(classes)}  # the official order is alphabetical
        labels = torch.tensor([numbers[name.split("/")[1]] for name in names])
        return load_decoded(source, names, _SIZE, self.in_channels, self.cache_dir), labels

    def _from_pickles(self, split: str) -> tuple[Tensor, Tensor]:
        try:
            with warnings.catch_warnings():
                # The files date from 2009; newer numpy warns about how they store an array's type.
                warnings.filterwarnings("ignore", message=".*align should be passed.*")
                official = self.official(train=split == "train", download=False)
        except RuntimeError as error:
            raise DataNotFoundError(
                f"root: got {self.root!r}, whose {self.pickles}/ is incomplete or damaged; expected the"
                " official files (delete it and set download: true to fetch them)"
            ) from error
        images = torch.from_numpy(official.data).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor(official.targets)
