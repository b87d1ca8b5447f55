"""Order and resumption: which images a process sees, when, and where it takes up an interrupted epoch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_n2uq.datamodules._data.counter_rng import generator_seed


class SampleIdSampler(DistributedSampler[int]):
    """Yields sample ids `epoch * size + index`; the order of an epoch follows from `(seed, epoch)`.

    A sample id carries the epoch to the data set, also into worker processes that live through many epochs:
    augmentation can depend on it. Without `shuffle` sample ids are plain indices. Lightning leaves the
    sampler in place whatever `use_distributed_sampler` says, since it is a `DistributedSampler`.

    Shards: with `pad` all ranks get the same number of images, as training under DDP requires; the first ones
    of the order come twice where the ranks do not divide `size`. Without it every image comes exactly once,
    for exact metrics, unless the ranks would then differ in their number of batches, for which DDP would wait
    forever: then it pads too.

    Args:
        size: The number of images.
        batch_size: Images per batch and process.
        shuffle: Whether the images are permuted anew in every epoch.
        seed: The seed of the permutations.
        num_replicas: The number of processes.
        rank: The rank of this process.
        pad: Whether all ranks get the same number of images.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        pad: bool = True,
    ) -> None:
        super().__init__(range(size), num_replicas, rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.size = size
        self.skip = 0  # images to leave out of the next pass: where an interrupted epoch continues
        most, least = -(-size // num_replicas), size // num_replicas
        self._padded = pad or -(-most // batch_size) != -(-least // batch_size)
        self.num_samples = most if self._padded else len(range(rank, size, num_replicas))
        self.total_size = self.num_samples * num_replicas if self._padded else size

    def order(self) -> list[int]:
        """Returns the image indices of the whole epoch, before they are sharded over the ranks."""
        if not self.shuffle:
            return list(range(self.size))
        generator = torch.Generator().manual_seed(generator_seed(self.seed, self.epoch))
        return torch.randperm(self.size, generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        while len(order) < self.total_size:
            order += order[: self.total_size - len(order)]
        first = self.epoch * self.size if self.shuffle else 0  # prediction writers read these as indices
        mine = [first + index for index in order[self.rank :: self.num_replicas]]
        start, self.skip = self.skip, 0
        return iter(mine[start:])

    def __len__(self) -> int:
        return self.num_samples


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` whose position within an epoch travels in Lightning's checkpoints.

    A run resumed from a checkpoint written in the middle of an epoch continues with the next batch. Lightning
    creates the iterator of a resumed run before it tells the sampler the epoch: the order is therefore fixed
    at the first batch, not when the iterator is made.
    """

    _delivered = 0
    _resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        self._delivered = self._take_resume_point()
        if isinstance(self.sampler, SampleIdSampler) and self.batch_size is not None:
            self.sampler.skip = self._delivered * self.batch_size
        for batch in super().__iter__():
            self._delivered += 1
            yield batch

    def _take_resume_point(self) -> int:
        point, self._resume = self._resume, None
        # A checkpoint from the end of epoch e counts all its batches; the run then starts epoch e + 1.
        return point["batches"] if point is not None and point["epoch"] == self._epoch() else 0

    def _epoch(self) -> int:
        return int(getattr(self.sampler, "epoch", 0))

    def state_dict(self) -> dict[str, int]:
        """Returns the epoch and the number of batches delivered in it."""
        return {"epoch": self._epoch(), "batches": self._delivered}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continues at `state_dict` if the next pass is of the same epoch."""
        self._resume = dict(state_dict)
