# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton: what the kernels of the threshold quantizer share, standalone or in the fused chain.

Values lie in one dimension, each thread holding some; bounds and segments lie in a second that every thread
holds whole, so that a search and a sum per segment need no exchange between threads. Counts are kept as
floats (they are small), because a comparison makes a float as cheaply as a truth value.
"""

import triton
import triton.language as tl

BACKWARD_TILE = 128  # one value per thread: then values and rows of bounds need no exchange of threads
MOST_HELD = 16  # bounds, or segments, that a thread holds at a time; more would not fit its registers


def held_bounds(n: int) -> int:
    """How many of the `n + 1` knots the kernels hold at a time: a power of two."""
    return min(MOST_HELD, int(triton.next_power_of_2(n + 1)))


@triton.jit
def load_bounds(bounds_ptr, first, count, HELD: tl.constexpr):
    """`HELD` of `count` bounds from `first` on; behind the last there is nothing to find."""
    k = first + tl.arange(0, HELD)
    return tl.load(bounds_ptr + k, mask=k < count, other=float("inf"))


@triton.jit
def count_below(s, held, bounds_ptr, count, HELD: tl.constexpr, CHUNKS: tl.constexpr):
    """How many of `count` bounds are below each `s` (NaN: 0), in the dtype of `s`.

    `held` are the first `HELD` bounds, which the caller has loaded once; the others are loaded here.
    """
    number = tl.sum((s[None, :] > held[:, None]).to(s.dtype), axis=0)
    for chunk in range(1, CHUNKS):
        bounds = load_bounds(bounds_ptr, chunk * HELD, count, HELD)
        number += tl.sum((s[None, :] > bounds[:, None]).to(s.dtype), axis=0)
    return number


@triton.jit
def index_of(number):
    """A small count as int32; in float32 by the low bits of the sum with 2^23, cheaper than a conversion."""
    if number.dtype == tl.float32:
        return (number + 8388608.0).to(tl.int32, bitcast=True) & 0xFFFF
    return number.to(tl.int32)


@triton.jit
def segment_of(s, inside, held, knots_ptr, n, HELD: tl.constexpr, CHUNKS: tl.constexpr):
    """Index 0 .. n + 1 of the segment that holds `s`, NaN in segment `n`, 0 outside of the tensor."""
    segment = count_below(s, held, knots_ptr, n + 1, HELD, CHUNKS)
    segment = tl.where(s != s, tl.zeros_like(s) + n, segment)
    return tl.where(inside, segment, 0.0).to(s.dtype)


@triton.jit
def slope_of(s, segment, slopes_ptr):
    """The surrogate's slope, NaN for NaN."""
    return tl.where(s != s, s, tl.load(slopes_ptr + index_of(segment)))


@triton.jit
def level_of(s, segment, thresholds_ptr, levels_ptr, n):
    """The staircase `D q`, NaN for NaN: a segment has one threshold, so one more comparison gives `q`."""
    index = index_of(segment)
    has_threshold = (index > 0) & (index <= n)
    threshold = tl.load(thresholds_ptr + index - 1, mask=has_threshold, other=float("inf"))
    code = tl.maximum(index - 1, 0) + (s > threshold).to(tl.int32)
    return tl.where(s != s, s, tl.load(levels_ptr + code))


@triton.jit
def add_to_segments(grad_sum, grad_v_sum, g, v, segment, first, n, HELD: tl.constexpr):
    """Adds `g` and `g v` to the sums `[HELD, values]` of the segments from `first` on, one row each.

    A product with 0 or 1 chooses the row. Flat ends are left out first, since their values may be infinite;
    a NaN or an infinite gradient then reaches every row, as it reaches every parameter in the end.
    """
    climbs = (segment > 0) & (segment <= n)
    gv = tl.where(climbs, g * v, 0.0).to(g.dtype)
    rows = (first + tl.arange(0, HELD)).to(segment.dtype)
    mine = (segment[None, :] == rows[:, None]).to(g.dtype)
    return tl.fma(mine, tl.zeros_like(mine) + g[None, :], grad_sum), tl.fma(
        mine, tl.zeros_like(mine) + gv[None, :], grad_v_sum
    )
