"""The message format of nonuniformly quantized gradients: what every kernel of the codec agrees on.

A message of `n` coordinates in buckets of `d` with `b` bits is, byte for byte,

    norms   ceil(n / d) little-endian fp32, one per bucket
    codes   ceil(n * b / 8) bytes; code `i` is bits `i*b .. i*b + b - 1`, least significant first,
            running on over byte borders (3 bits: 8 codes in 3 bytes); unused bits of the last byte are 0

A code is a sign bit (the highest) above `b - 1` magnitude bits, an index into the ascending levels
`0 = l_0 < l_1 < .. = 1`. It decodes to `sign * level * norm`. A negative zero is never sent.
"""

import dataclasses
import functools
import itertools
import math
from typing import Literal, get_args

import torch

from lightning_n2uq.utils.validation import check, check_choice, check_integer

Family = Literal["float", "uniform", "table"]
Norm = Literal["l2", "linf"]

BITS = (2, 3, 4, 8)
MAX_BUCKET_SIZE = 32768  # squares of 24-bit integers, summed exactly in int64, leave room for 2**15 of them
_ONE = 127  # biased exponent of 1.0 in fp32


@dataclasses.dataclass(frozen=True)
class NUQFormat:
    """Everything that determines a message besides the data and the seed.

    Args:
        bits: Bits per code, sign included: 2, 3, 4 or 8.
        bucket_size: Coordinates per bucket, a multiple of 8 so that buckets start at whole bytes.
        norm: `l2` or `linf`, the norm a bucket is scaled by.
        family: `float` (levels are small floating-point numbers; the paper's exponential levels when
            `mantissa_bits` is 0), `uniform`, or `table` (any ascending list).
        mantissa_bits: Mantissa bits of the `float` family, 0 otherwise.
        table: The levels of the `table` family, empty otherwise.

    Raises:
        ValueError: If an argument is outside what the format can carry.
    """

    bits: int = 4
    bucket_size: int = 1024
    norm: Norm = "l2"
    family: Family = "float"
    mantissa_bits: int = 0
    table: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check(self.bits in BITS, "bits", self.bits, f"are {', '.join(map(str, BITS))}")
        size = self.bucket_size
        fits = isinstance(size, int) and size % 8 == 0 and 8 <= size <= MAX_BUCKET_SIZE
        check(fits, "bucket_size", size, f"is a multiple of 8 from 8 to {MAX_BUCKET_SIZE}")
        check_choice("norm", self.norm, get_args(Norm))
        check_choice("family", self.family, get_args(Family))
        highest = self.bits - 2 if self.family == "float" else 0
        check_integer("mantissa_bits", self.mantissa_bits, 0, highest)
        _check_table(self.family, self.table, self.top + 1)

    @property
    def top(self) -> int:
        """Returns the highest magnitude code, which stands for level 1."""
        return (1 << (self.bits - 1)) - 1

    @property
    def code_offset(self) -> int:
        """Returns by how much the code of a level is less than its leading fp32 bits (`float` family)."""
        return (_ONE << self.mantissa_bits) - self.top

    @functools.cached_property
    def levels(self) -> tuple[float, ...]:
        """Returns the `2**(bits - 1)` levels, ascending from 0 to 1, in fp32 (`uniform`: rounded)."""
        if self.family == "table":
            return tuple(_fp32(level) for level in self.table)
        if self.family == "uniform":
            return tuple(_fp32(code / self.top) for code in range(self.top + 1))
        return (0.0, *(self._float_level(code) for code in range(1, self.top + 1)))

    def _float_level(self, code: int) -> float:
        exponent, mantissa = divmod(self.code_offset + code, 1 << self.mantissa_bits)
        return math.ldexp(1 + mantissa / (1 << self.mantissa_bits), exponent - _ONE)

    @functools.cached_property
    def inverse_lowest(self) -> float:
        """Returns `1 / l_1` rounded to fp32 (exact for exponential levels)."""
        return _fp32(1.0 / self.levels[1])

    def signed_levels(self) -> torch.Tensor:
        """Returns every code's value in units of the norm: fp32 `[2**bits]`, the upper half negative."""
        levels = torch.tensor(self.levels, dtype=torch.float32)
        negative = -levels
        negative[0] = 0.0
        return torch.cat([levels, negative])

    def num_buckets(self, numel: int) -> int:
        """Returns how many buckets `numel` coordinates make; the last may be shorter."""
        return -(-numel // self.bucket_size)

    def norm_bytes(self, numel: int) -> int:
        """Returns the bytes of the norms, which is also where the codes start."""
        return 4 * self.num_buckets(numel)

    def code_bytes(self, numel: int) -> int:
        """Returns the bytes of the packed codes."""
        return -(-numel * self.bits // 8)

    def nbytes(self, numel: int) -> int:
        """Returns the bytes of the whole message."""
        return self.norm_bytes(numel) + self.code_bytes(numel)


def _fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32).item())


def _check_table(family: str, table: tuple[float, ...], count: int) -> None:
    if family != "table":
        check(not table, "levels", table, f"is an empty list with {family!r} levels")
        return
    rounded = [_fp32(level) for level in table]
    ascending = all(low < high for low, high in itertools.pairwise(rounded))
    fits = len(table) == count and rounded[0] == 0.0 and rounded[-1] == 1.0 and ascending
    check(fits, "levels", table, f"are {count} ascending numbers from 0 to 1, distinct in fp32")
