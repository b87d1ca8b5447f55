"""Counter-based random numbers of the codec: a pure function of seed, bucket and position.

Nothing is drawn from a stream, so any thread of any device computes the same 32 bits for a coordinate,
whatever the order: payloads are equal byte for byte on CPU and CUDA and for any number of threads.

For the 64-bit key `(lo, hi)` of a message, bucket `k` and position `j` inside it (all modulo 2**32):

    k0 = mix(lo + GOLDEN * k),  k1 = mix(hi ^ k0)
    x  = k0 + GOLDEN * j,  x ^= x >> 16,  x *= M1,  x ^= k1,  x ^= x >> 13,  x *= M2,  x ^= x >> 16

`mix` is the 32-bit finaliser of MurmurHash3 (public domain, A. Appleby); the element function is the same
finaliser with the second key word added half way, so that two buckets never share a permutation.
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: steps of a Weyl sequence
M1 = 0x85EBCA6B
M2 = 0xC2B2AE35
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


class MessageSeed(int):
    """The seed of one message, and what all ranks' messages about the same coordinates have in common.

    Attributes:
        shared: A seed that is equal on all ranks and another one in every step.
    """

    shared: int

    def __new__(cls, value: int, shared: int) -> "MessageSeed":
        """Makes the integer, with what is shared as an attribute.

        Args:
            value: The message's own seed.
            shared: A seed that is equal on all ranks and another one in every step.
        """
        seed = super().__new__(cls, value)
        seed.shared = shared
        return seed


def mix_seed(base: int, rank: int, step: int, tensor_index: int) -> int:
    """Returns one seed per (run, rank, step, tensor): a 64-bit hash, so that neighbours are unrelated.

    Args:
        base: The run's seed; any integer, of which 64 bits count.
        rank: The rank of the process.
        step: The optimisation step.
        tensor_index: The number of the message in the step.

    Returns:
        An integer in `0 .. 2**64 - 1`.
    """
    state = base & _MASK64
    for word in (rank, step, tensor_index):
        state = _finalise64(state ^ _finalise64(word + 0x9E3779B97F4A7C15))
    return state


def message_key(seed: int) -> tuple[int, int]:
    """Returns the 32-bit key words `(lo, hi)` of a message; hashing keeps seeds 0, 1, 2.. apart."""
    key = _finalise64(seed + 0x9E3779B97F4A7C15)
    return key & _MASK32, key >> 32


def _finalise64(value: int) -> int:
    """Applies the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): it maps words one to one."""
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def random_bits(
    seed: int, num_buckets: int, bucket_size: int, device: torch.device | str = "cpu", first: int = 0
) -> Tensor:
    """Returns the random words of a message, for the reference.

    Args:
        seed: The seed of the message.
        num_buckets: The number of buckets.
        bucket_size: The number of coordinates per bucket.
        device: Where the words are computed.
        first: The number of the first bucket.

    Returns:
        int64 tensor `[num_buckets, bucket_size]` with values in `0 .. 2**32 - 1`.
    """
    return words_of_key(message_key(seed), first, num_buckets, bucket_size, device)


def words_of_key(
    key: tuple[int, int], first: int, num_buckets: int, bucket_size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Returns the random words of a key, as `random_bits` does for a seed."""
    lo, hi = key
    bucket = torch.arange(first, first + num_buckets, dtype=torch.int64, device=device).unsqueeze(1)
    position = torch.arange(bucket_size, dtype=torch.int64, device=device).unsqueeze(0)
    k0 = _mix(lo + GOLDEN * bucket)
    k1 = _mix(hi ^ k0)
    return _mix(k0 + GOLDEN * position, k1)


def _mix(x: Tensor, key: Tensor | None = None) -> Tensor:
    """Applies the 32-bit finaliser to int64 tensors, of whose products the low half is right."""
    x = x & _MASK32
    x = ((x ^ (x >> 16)) * M1) & _MASK32
    if key is not None:
        x = x ^ key
    x = ((x ^ (x >> 13)) * M2) & _MASK32
    return x ^ (x >> 16)
