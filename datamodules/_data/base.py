"""What all data modules share: shapes known at construction, order, shards, resumption, one-line errors."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_n2uq.datamodules._data.sampler import ResumableLoader, SampleIdSampler
from lightning_n2uq.datamodules._data.shared_memory import workers_with_room
from lightning_n2uq.utils.class_names import KEY, check_class_names
from lightning_n2uq.utils.validation import check, check_integer

Split = Literal["train", "val", "test"]
_STAGE_SPLITS: dict[str | None, tuple[Split, ...]] = {
    None: ("train", "val", "test"),
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}


class DataNotFoundError(FileNotFoundError, ValueError):
    """A file or folder that an argument names is not there; the message is one line."""


class ImageDataModule(LightningDataModule, ABC):
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
        super().__init__()
        self.num_classes = check_integer("num_classes", num_classes, 1)
        self.in_channels = check_integer("in_channels", in_channels, 1)
        self.image_size = check_integer("image_size", image_size, 1)
        self.batch_size = check_integer("batch_size", batch_size, 1)
        if num_workers is not None:
            check_integer("num_workers", num_workers, 0, max(64, 8 * (os.cpu_count() or 1)))
        self.num_workers = num_workers
        self.seed = check_integer("seed", seed, 0)
        self.drop_last = drop_last
        self.splits: dict[Split, Dataset[Any]] = {}

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes in the order of their numbers; None where the data has none."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Returns the class names, for the checkpoint: `test` and `export` match classes by name."""
        names = self.class_names
        return {} if names is None else {KEY: names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compares the class names with a checkpoint's.

        Raises:
            ValueError: They are others, or in another order: labels would be shifted.
        """
        saved, names = state_dict.get(KEY), self.class_names
        if saved is not None and names is not None:
            check_class_names(saved, names, "data")

    @abstractmethod
    def load_split(self, split: Split) -> Dataset[Any]:
        """Returns one split, a data set whose `__getitems__(sample_ids)` returns a whole batch."""

    def setup(self, stage: str | None = None) -> None:
        """Loads the splits that `stage` needs (`fit`, `validate`, `test`, `predict`, None for all).

        Raises:
            ValueError: The data is missing, or a batch exceeds a process's share of the training split.
        """
        for split in _STAGE_SPLITS[stage]:
            if split not in self.splits:
                self.splits[split] = self.load_split(split)
        if "train" in self.splits:
            self._check_batch_size(len(self.splits["train"]))  # type: ignore[arg-type]

    def _check_batch_size(self, images: int) -> None:
        processes, _ = self._processes()
        share = -(-images // processes)
        over = f" over {processes} processes" if processes > 1 else ""
        allowed = f"is 1 to {share} (the training split has {images} images{over})"
        check(self.batch_size <= share, "batch_size", self.batch_size, allowed)

    def _processes(self) -> tuple[int, int]:
        """Returns the number of data-parallel processes and the rank of this one."""
        kwargs = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (1, 0) if kwargs is None else (int(kwargs["num_replicas"]), int(kwargs["rank"]))

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        devices = 1 if self.trainer is None else self.trainer.num_devices
        return min(8, cpus // devices)

    def _loader(self, split: Split, *, training: bool = False) -> DataLoader[Any]:
        if split not in self.splits:
            self.setup(None)
        dataset = self.splits[split]
        images = min(self.batch_size, len(dataset))  # type: ignore[arg-type]
        workers = workers_with_room(
            self._workers(), 4 * images * self.in_channels * self.image_size * self.image_size
        )
        processes, rank = self._processes()
        sampler = SampleIdSampler(
            len(dataset),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            shuffle=training,
            seed=self.seed,
            num_replicas=processes,
            rank=rank,
            pad=training,
        )
        return (ResumableLoader if training else DataLoader)(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=_identity,
            drop_last=training and self.drop_last,
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # else each epoch draws from the global one
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns a loader over the training split: shuffled, augmented, resumable."""
        return self._loader("train", training=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns a loader over the validation split, in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns a loader over the test split, in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Returns a loader over the test split, in order and with labels."""
        return self._loader("test")


def existing_path(name: str, value: str | Path, expected: str) -> Path:
    """Returns `value` as a path, with `~` expanded.

    Raises:
        DataNotFoundError: Nothing is there; the message names the argument, the value and what is expected.
    """
    path = Path(value).expanduser()
    if not path.exists():
        raise DataNotFoundError(f"{name}: got {str(value)!r}, which does not exist; expected {expected}")
    return path


def _identity(batch: Any) -> Any:  # noqa: ANN401  (a tuple, where DataLoader's annotation says list)
    """Returns a batch as it is: the data set builds whole batches."""
    return batch
