"""Random numbers that depend on a key alone, not on who asks or in which order.

Augmentation drawn from a global generator changes with the number of loader workers, with the number of
processes and with every resume. Here each draw is a hash of (seed, ticket, stream), where a ticket names one
visit of one image (``epoch * size + index``), so all of these runs see the same pixels.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


Words = npt.NDArray[np.uint64]


def _mix(state: Words) -> Words:
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014, figure 15), elementwise modulo 2^64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def keyed_bits(seed: int, tickets: list[int] | Tensor, streams: int = 1) -> Words:
    """Hashes every ticket into independent 64-bit words.

    Args:
        seed: the run's seed; any integer, taken modulo 2^64.
        tickets: ``[B]`` non-negative integers.
        streams: number of words per ticket.

    Returns:
        ``[B, streams]`` uint64.
    """
    numbers = np.asarray(tickets, dtype=np.int64).astype(np.uint64)
    start = _mix(np.array([seed % 2**64], dtype=np.uint64) + _GOLDEN)
    words = _mix(start + (numbers + np.uint64(1)) * _GOLDEN)
    return _mix(words[:, None] + np.arange(1, streams + 1, dtype=np.uint64) * _GOLDEN)


def keyed_integers(seed: int, tickets: list[int] | Tensor, highs: tuple[int, ...]) -> Tensor:
    """Draws one integer per ticket and column, uniform on ``0 .. highs[column] - 1``.

    The modulo bias is below ``high / 2^64``.

    Args:
        seed: the run's seed.
        tickets: ``[B]`` non-negative integers.
        highs: exclusive upper bounds, one per column.

    Returns:
        ``[B, len(highs)]`` int64.
    """
    words = keyed_bits(seed, tickets, len(highs)) % np.asarray(highs, dtype=np.uint64)
    return torch.from_numpy(words.astype(np.int64))


def keyed_seed(seed: int, ticket: int) -> int:
    """One 63-bit seed for a generator that belongs to one ticket."""
    return int(keyed_bits(seed, [ticket])[0, 0] >> np.uint64(1))
