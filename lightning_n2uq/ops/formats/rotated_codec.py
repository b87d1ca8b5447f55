"""The message format of rotated gradients: what every kernel of the rotated codec agrees on.

A gradient is cut into buckets of `d` coordinates, `d` a power of two. A last, shorter bucket is padded with
zeros to the next power of two, at least 8; what it decodes to behind the end is dropped. A bucket `v` is
rotated to `u = H D v`: `D` flips signs at random, `H` is the Walsh-Hadamard matrix (natural order, entries 1
and -1, not normalised). Codes stand for `u`, and `v` is `D H u / d`. A message is, byte for byte,

    key      8 bytes: the words `(lo, hi)` from which the signs of `D` are drawn, little-endian
    scales   little-endian fp32, one per bucket, in units of `2**half`, `half = log2(d) // 2`
    groups   with stochastic rounding one byte per group of 128 coordinates (fewer in a smaller bucket)
    codes    `bits` bits per coordinate, least significant first, running on over byte borders

Coordinate `j` of bucket `k` is flipped where bit `j % 32` of the random word `(k, j // 32)` is set. A code is
a sign bit (the highest) above `bits - 1` magnitude bits, an index into the positive levels. With `stochastic`
rounding it decodes to `sign * level * scale * byte / 255`, with `eden` to `sign * level * scale`. A scale
that is not finite decodes to NaN in the whole bucket.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, get_args

from lightning_n2uq.ops.backends.common.rng import MessageSeed, message_key, mix_seed
from lightning_n2uq.ops.formats.gradient_codec import MAX_BUCKET_SIZE
from lightning_n2uq.ops.gaussian_levels import nearest_borders, nearest_levels, stochastic_levels
from lightning_n2uq.utils.validation import check, check_choice, check_integer

Rounding = Literal["stochastic", "eden"]

KEY_BYTES = 8
SMALLEST = 8
GROUP = 128
_ROTATION = 0x524F5441  # keeps the signs' random words apart from those of the rounding


@dataclasses.dataclass(frozen=True)
class RotatedFormat:
    """Everything that determines a message besides the data and the seed.

    Args:
        bits: Bits per code, sign included, 1 to 4.
        bucket_size: Coordinates per bucket, a power of two.
        rounding: `stochastic` (unbiased for every input and rotation) or `eden` (nearest level).

    Raises:
        ValueError: If an argument is outside what the format can carry.
    """

    bits: int = 4
    bucket_size: int = 1024
    rounding: Rounding = "stochastic"

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, 1, 4)
        size = self.bucket_size
        fits = isinstance(size, int) and SMALLEST <= size <= MAX_BUCKET_SIZE and size & (size - 1) == 0
        allowed = f"is a power of two from {SMALLEST} to {MAX_BUCKET_SIZE} with rotation='hadamard'"
        check(fits, "bucket_size", size, allowed)
        check_choice("rounding", self.rounding, get_args(Rounding))

    @property
    def stochastic(self) -> bool:
        """Returns whether rounding is stochastic."""
        return self.rounding == "stochastic"

    @functools.cached_property
    def levels(self) -> tuple[float, ...]:
        """Returns the positive levels, ascending: `stochastic` up to 1, `eden` in standard deviations."""
        if self.stochastic:
            return stochastic_levels(self.bits, min(GROUP, self.bucket_size))
        return nearest_levels(self.bits)

    def borders(self, size: int) -> tuple[float, ...]:
        """Returns `eden`'s borders between levels for a bucket of `size`, in units of its norm `||u||`."""
        return tuple(border / math.sqrt(size) for border in nearest_borders(self.levels))

    def key(self, seed: int) -> tuple[int, int]:
        """Returns the words from which a message's signs are drawn.

        With stochastic rounding they come from what the ranks share in a step, where the seed says it:
        messages are then averaged before they are rotated back. With nearest rounding every message has its
        own rotation, so that equal gradients on all ranks do not share their error.
        """
        shared = seed.shared if self.stochastic and isinstance(seed, MessageSeed) else seed
        return message_key(mix_seed(shared, 0, 0, _ROTATION))

    def sizes(self, numel: int) -> tuple[int, int]:
        """Returns the number of whole buckets and the padded size of the last, 0 where there is no rest."""
        whole, rest = divmod(numel, self.bucket_size)
        return whole, max(SMALLEST, 1 << (rest - 1).bit_length()) if rest else 0

    def num_buckets(self, numel: int) -> int:
        """Returns how many buckets `numel` coordinates make; the last may be smaller."""
        return -(-numel // self.bucket_size)

    def num_groups(self, size: int) -> int:
        """Returns how many groups a bucket of `size` has; none but with stochastic rounding."""
        return -(-size // GROUP) if self.stochastic else 0

    def groups_start(self, numel: int) -> int:
        """Returns where the groups' bytes begin."""
        return KEY_BYTES + 4 * self.num_buckets(numel)

    def codes_start(self, numel: int) -> int:
        """Returns where the codes begin."""
        whole, rest = self.sizes(numel)
        groups = whole * self.num_groups(self.bucket_size) + self.num_groups(rest)
        return self.groups_start(numel) + groups

    def nbytes(self, numel: int) -> int:
        """Returns the bytes of the whole message."""
        whole, rest = self.sizes(numel)
        return self.codes_start(numel) + (whole * self.bucket_size + rest) * self.bits // 8 if numel else 0
