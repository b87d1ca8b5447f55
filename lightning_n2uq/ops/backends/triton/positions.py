# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton: what the kernels of the threshold quantizer share, standalone or in the fused chain.

A tile is `[LANES, GROUP]`: each thread holds a group of four values that lie side by side in memory. A search
or a sum per width takes the four one after the other as vectors `[LANES]`, with the bounds (or widths) in
a second dimension that every thread holds whole, so that threads exchange nothing. Counts are kept as floats
(they are small), because a comparison makes a float as cheaply as a truth value; the share of a segment that
lies below an input is one multiply-add with saturation.
"""

import triton
import triton.language as tl

from lightning_n2uq.ops.backends.triton import tables
from lightning_n2uq.ops.backends.triton.product import FUSED, INTERPRETED
from lightning_n2uq.ops.backends.triton.tables import INVERSES, OFFSETS

CLIMBS = tl.constexpr(tables.CLIMBS)
LANES = 128  # threads of a program
MULTIPROCESSORS = 132  # of an H100; a fixed number keeps the order of additions
LAUNCH = {"LANES": LANES, **FUSED}
UNSPECIALIZED = ["rows", "tiles"]  # a kernel compiled for their divisors, or for 1, would be no faster
GROUP = 4
MOST_HELD = 16  # bounds, or widths, that a thread holds at a time; more would not fit its registers


def held_bounds(n: int) -> int:
    """Returns how many of the knots, or of the widths, the kernels hold at a time: a power of two."""
    return min(MOST_HELD, int(triton.next_power_of_2(n + 1)))


@triton.jit
def split4(values):
    """Returns the four columns of `[LANES, 4]`."""
    even, odd = tl.split(tl.reshape(values, [values.shape[0], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def join4(first, second, third, fourth):
    """Returns `[LANES, 4]` of its columns."""
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [first.shape[0], 4])


@triton.jit
def load_bounds(bounds_ptr, first, count, HELD: tl.constexpr):
    """Returns `HELD` of `count` bounds from `first` on; behind the last there is nothing to find."""
    k = first + tl.arange(0, HELD)
    return tl.load(bounds_ptr + k, mask=k < count, other=float("inf"))


@triton.jit
def count_below(s, held, bounds_ptr, count, HELD: tl.constexpr, CHUNKS: tl.constexpr):
    """Returns how many of `count` bounds are below each `s` (NaN: 0), in the dtype of `s`.

    `held` are the first `HELD` bounds, which the caller has loaded once; the others are loaded here.
    """
    number = tl.sum((s[None, :] > held[:, None]).to(s.dtype), axis=0)
    for chunk in range(1, CHUNKS):
        bounds = load_bounds(bounds_ptr, chunk * HELD, count, HELD)
        number += tl.sum((s[None, :] > bounds[:, None]).to(s.dtype), axis=0)
    return number


@triton.jit
def load_pivots(bounds_ptr):
    """Returns three of fifteen bounds, for `count_below_fifteen`."""
    return tl.load(bounds_ptr + 3), tl.load(bounds_ptr + 7), tl.load(bounds_ptr + 11)


@triton.jit
def count_below_fifteen(s, low, middle, high, bounds_ptr):
    """Returns how many of fifteen bounds are below each `s` (NaN: 0), int32.

    The pivots choose three more to compare with.
    """
    block = (s > low).to(s.dtype) + (s > middle).to(s.dtype) + (s > high).to(s.dtype)
    first = 4 * index_of(block)
    number = (s > tl.load(bounds_ptr + first)).to(s.dtype)
    number += (s > tl.load(bounds_ptr + first + 1)).to(s.dtype)
    number += (s > tl.load(bounds_ptr + first + 2)).to(s.dtype)
    return first + index_of(number)


@triton.jit
def index_of(number):
    """Returns a small count as int32; in float32 by the low bits of its sum with 2^23, which is cheaper."""
    if number.dtype == tl.float32:
        return (number + 8388608.0).to(tl.int32, bitcast=True) & 0xFFFF
    return number.to(tl.int32)


@triton.jit
def climbed(s, inverse, offset):
    """Returns `inverse * s + offset`, rounded once and held to 0..1, of equal shapes; 0 for NaN."""
    if INTERPRETED or s.dtype != tl.float32:
        share = tl.minimum(tl.maximum(tl.fma(s, inverse, offset), 0.0), 1.0).to(s.dtype)
    else:
        share = tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [s, inverse, offset],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return share


@triton.jit
def add_climbs(climbs, pull, s, inverse, offset):
    """Adds `pull * c_k` to the sums `[HELD, LANES]`, one row per width; see `tables`.

    `inverse` and `offset` are `[HELD, LANES]` too, the same in every column.
    """
    share = climbed(tl.broadcast_to(s[None, :], climbs.shape), inverse, offset)
    return tl.fma(share, tl.broadcast_to(pull[None, :], climbs.shape), climbs)


@triton.jit
def add_group(climbs, pull, s, inverse, offset):
    """Does `add_climbs` of `[LANES, 4]`, column after column."""
    a0, a1, a2, a3 = split4(pull)
    s0, s1, s2, s3 = split4(s)
    climbs = add_climbs(climbs, a0, s0, inverse, offset)
    climbs = add_climbs(climbs, a1, s1, inverse, offset)
    climbs = add_climbs(climbs, a2, s2, inverse, offset)
    return add_climbs(climbs, a3, s3, inverse, offset)


@triton.jit
def load_shares(tables_ptr, first, n, HELD: tl.constexpr, LANES: tl.constexpr):
    """Returns `inverse` and `offset` of `HELD` widths from `first` on; behind the last, zeros."""
    k = first + tl.arange(0, HELD)
    inverse = tl.load(tables_ptr + INVERSES * (n + 2) + k, mask=k < n, other=0.0)
    offset = tl.load(tables_ptr + OFFSETS * (n + 2) + k, mask=k < n, other=0.0)
    shape: tl.constexpr = [HELD, LANES]
    return tl.broadcast_to(inverse[:, None], shape), tl.broadcast_to(offset[:, None], shape)


@triton.jit
def flat_to_zero(pull, v):
    """Returns `v` where the surrogate climbs; elsewhere, where it may be infinite, 0. NaN stays in `pull`."""
    return tl.where(pull == 0, 0.0, v).to(v.dtype)


@triton.jit
def add_products(sums, a, b):
    """Adds the products of two `[LANES, 4]` to `sums` `[LANES]`, column after column."""
    a0, a1, a2, a3 = split4(a)
    b0, b1, b2, b3 = split4(b)
    return tl.fma(a3, b3, tl.fma(a2, b2, tl.fma(a1, b1, tl.fma(a0, b0, sums))))


@triton.jit
def add_values(sums, a):
    """Adds `[LANES, 4]` to `sums` `[LANES]`, column after column."""
    a0, a1, a2, a3 = split4(a)
    return sums + a0 + a1 + a2 + a3


@triton.jit
def total(sums):
    """Returns the sum of `[LANES]`, float64."""
    return tl.sum(sums.to(tl.float64), axis=0)


@triton.jit
def store_climbs(sums_ptr, climbs, first, n, HELD: tl.constexpr) -> None:
    """Writes a program's sums of the widths from `first` on to its row, see `tables`."""
    k = first + tl.arange(0, HELD)
    tl.store(sums_ptr + CLIMBS + k, tl.sum(climbs.to(tl.float64), axis=1), mask=k < n)
