"""Memory of a launch: every access is checked for bounds, alignment and races."""

import ctypes

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Bytes = NDArray[np.uint8]


class Fault(Exception):
    """What a GPU would refuse, or answer differently from time to time."""


def _aligned(addresses: np.ndarray, size: int) -> None:
    wrong = addresses % addresses.dtype.type(size) != 0
    if wrong.any():
        raise Fault(f"{size} bytes at {int(addresses[wrong][0]):#x}, which {size} does not divide")


class Storage:
    """The bytes of a tensor, and which program wrote them in this launch (a `mark`; 0: none)."""

    def __init__(self, start: int, size: int) -> None:
        self.start, self.end = start, start + size
        self.bytes = np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8)
        self.writers = np.zeros(size, np.uint8)  # no page is taken before it is touched


def mark(programs: Integers) -> Bytes:
    """A byte for each program's number: programs next to each other differ."""
    return (programs % 255 + 1).astype(np.uint8)


class GlobalMemory:
    """The storages of a launch's tensors. What one program writes, no other may read or change."""

    def __init__(self, ranges: set[tuple[int, int]]) -> None:
        self.storages = [Storage(start, size) for start, size in sorted(ranges) if size]

    def load(self, addresses: NDArray[np.uint64], size: int, programs: Integers) -> Bytes:
        """`[threads, size]` bytes."""
        result = np.empty((len(addresses), size), np.uint8)
        for storage, threads, places in self._places(addresses, size):
            writers = storage.writers[places]
            if ((writers != 0) & (writers != mark(programs[threads, None]))).any():
                raise Fault("a program reads what another one writes")
            result[threads] = storage.bytes[places]
        return result

    def store(self, addresses: NDArray[np.uint64], data: Bytes, programs: Integers) -> None:
        for storage, threads, places in self._places(addresses, data.shape[1]):
            writers, new = storage.writers[places], data[threads]
            others = (writers != 0) & (writers != mark(programs[threads, None]))
            if (others & (storage.bytes[places] != new)).any():
                raise Fault("a program changes what another one writes")
            storage.bytes[places] = new
            if (storage.bytes[places] != new).any():
                raise Fault("two threads write different bytes to one place")
            storage.writers[places] = mark(programs[threads, None])

    def _places(self, addresses: NDArray[np.uint64], size: int):
        _aligned(addresses, size)
        left = np.ones(len(addresses), bool)
        for storage in self.storages:
            inside = left & (addresses >= np.uint64(storage.start))
            inside &= addresses + np.uint64(size) <= np.uint64(storage.end)
            if inside.any():
                left &= ~inside
                threads = np.flatnonzero(inside)
                offsets = (addresses[threads] - np.uint64(storage.start)).astype(np.int64)
                yield storage, threads, offsets[:, None] + np.arange(size)
            if not left.any():
                return
        raise Fault(f"{size} bytes at {int(addresses[left][0]):#x}, outside all tensors of the launch")


class SharedMemory:
    """`size` bytes for each of `programs`. Between two barriers, what one warp writes no other may touch."""

    def __init__(self, programs: int, size: int) -> None:
        self.size = size
        self.bytes = np.zeros((programs, size), np.uint8)
        self.written = np.zeros((programs, size), bool)
        self.epochs = np.zeros(programs, np.int32)  # barriers passed
        self.last_write = np.full((programs, size, 2), -1, np.int32)  # epoch, warp
        self.last_read = np.full((programs, size, 2), -1, np.int32)

    def barrier(self, programs: Integers) -> None:
        self.epochs[programs] += 1

    def load(self, addresses: NDArray[np.uint32], size: int, programs: Integers, warps: Integers) -> Bytes:
        """`[threads, size]` bytes."""
        place = self._place(addresses, size, programs)
        if not self.written[place].all():
            raise Fault("shared memory is read before it is written")
        self._check(self.last_write[place], programs, warps, "reads what another writes")
        self.last_read[place] = np.stack([self.epochs[programs], warps], 1)[:, None].astype(np.int32)
        return self.bytes[place]

    def store(self, addresses: NDArray[np.uint32], data: Bytes, programs: Integers, warps: Integers) -> None:
        place = self._place(addresses, data.shape[1], programs)
        changed = self.bytes[place] != data
        self._check(self.last_write[place], programs, warps, "changes what another writes", changed)
        self._check(self.last_read[place], programs, warps, "changes what another reads", changed)
        self.bytes[place], self.written[place] = data, True
        if (self.bytes[place] != data).any():
            raise Fault("two threads write different bytes to one place")
        self.last_write[place] = np.stack([self.epochs[programs], warps], 1)[:, None].astype(np.int32)

    def _place(self, addresses: np.ndarray, size: int, programs: Integers) -> tuple[np.ndarray, np.ndarray]:
        _aligned(addresses, size)
        places = addresses.astype(np.int64)[:, None] + np.arange(size)
        if places.size and places.max() >= self.size:
            raise Fault(f"byte {places.max()} of {self.size} bytes of shared memory")
        return programs[:, None], places

    def _check(
        self,
        last: np.ndarray,
        programs: Integers,
        warps: Integers,
        what: str,
        where: np.ndarray | bool = True,
    ) -> None:
        same_epoch = last[..., 0] == self.epochs[programs][:, None]
        if (same_epoch & (last[..., 1] != warps[:, None]) & where).any():
            raise Fault(f"a warp {what}, with no barrier between")
