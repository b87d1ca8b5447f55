"""Loaders over splits: order, shards, resumption, whatever a sample is."""

import os
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_n2uq.datamodules._data.sampler import ResumableLoader, SampleIdSampler
from lightning_n2uq.datamodules._data.shared_memory import workers_with_room
from lightning_n2uq.utils.validation import check, check_integer

Split = Literal["train", "val", "test"]
_STAGE_SPLITS: dict[str | None, tuple[Split, ...]] = {
    None: ("train", "val", "test"),
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}


class SplitDataModule(LightningDataModule, ABC):
    """Base of the data modules: three splits, of which the training split is shuffled and resumable.

    Reproducibility: the order of epoch `e` follows from `(seed, e)`. It is the same for any number of
    workers, and a run resumed from a checkpoint (also one written in the middle of an epoch) sees what an
    uninterrupted run sees. Several processes share one order.

    Args:
        batch_size: Samples per step and process.
        num_workers: Loader processes, at most 8 per processor (or 64); None chooses from the available CPUs.
        seed: The seed of the order.
        drop_last: Leaves out the last, smaller batch of a training epoch.

    Raises:
        ValueError: An argument is out of range.
    """

    samples = "samples"
    """What the samples are called in errors."""

    def __init__(
        self, *, batch_size: int, num_workers: int | None = 0, seed: int = 0, drop_last: bool = False
    ) -> None:
        super().__init__()
        self.batch_size = check_integer("batch_size", batch_size, 1)
        if num_workers is not None:
            check_integer("num_workers", num_workers, 0, max(64, 8 * (os.cpu_count() or 1)))
        self.num_workers = num_workers
        self.seed = check_integer("seed", seed, 0)
        self.drop_last = drop_last
        self.splits: dict[Split, Dataset[Any]] = {}

    @abstractmethod
    def load_split(self, split: Split) -> Dataset[Any]:
        """Returns one split, a data set whose `__getitems__(sample_ids)` returns a whole batch."""

    @abstractmethod
    def sample_bytes(self) -> int:
        """Returns the size of one sample of a batch, for the room that loader processes need."""

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

    def _check_batch_size(self, count: int) -> None:
        processes, _ = self._processes()
        share = -(-count // processes)
        over = f" over {processes} processes" if processes > 1 else ""
        allowed = f"is 1 to {share} (the training split has {count} {self.samples}{over})"
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
        count = min(self.batch_size, len(dataset))  # type: ignore[arg-type]
        workers = workers_with_room(self._workers(), count * self.sample_bytes())
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


def _identity(batch: Any) -> Any:  # noqa: ANN401  (a tuple, where DataLoader's annotation says list)
    """Returns a batch as it is: the data set builds whole batches."""
    return batch
