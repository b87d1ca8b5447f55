"""Counter-based random numbers: each is a hash of a seed and a sample id, whoever asks and in which order.

A sample id names one use of one image: `epoch * size + index`. Augmentation drawn from a global generator
would change with the number of loader workers, with the number of processes and with every resume; drawn like
this, it is the same in all of these runs (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC
2011).
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: Words) -> Words:
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014, figure 15), elementwise modulo 2^64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def random_bits(seed: int, sample_ids: list[int] | Tensor, streams: int = 1) -> Words:
    """Returns independent 64-bit words `[B, streams]` for every sample id.

    Args:
        seed: The run's seed; any integer, taken modulo 2^64.
        sample_ids: Non-negative integers `[B]`.
        streams: The number of words per sample id.
    """
    numbers = np.asarray(sample_ids, dtype=np.int64).astype(np.uint64)
    start = _mix(np.array([seed % 2**64], dtype=np.uint64) + _GOLDEN)
    words = _mix(start + (numbers + np.uint64(1)) * _GOLDEN)
    return _mix(words[:, None] + np.arange(1, streams + 1, dtype=np.uint64) * _GOLDEN)


def random_integers(seed: int, sample_ids: list[int] | Tensor, highs: tuple[int, ...]) -> Tensor:
    """Returns integers `[B, len(highs)]` int64; those of a column are uniform on `0 .. highs[column] - 1`.

    The modulo bias is below `high / 2^64`.

    Args:
        seed: The run's seed.
        sample_ids: Non-negative integers `[B]`.
        highs: The exclusive upper bound of each column.
    """
    words = random_bits(seed, sample_ids, len(highs)) % np.asarray(highs, dtype=np.uint64)
    return torch.from_numpy(words.astype(np.int64))


def generator_seed(seed: int, sample_id: int) -> int:
    """Returns a 63-bit seed for a generator that belongs to one sample id."""
    return int(random_bits(seed, [sample_id])[0, 0] >> np.uint64(1))
