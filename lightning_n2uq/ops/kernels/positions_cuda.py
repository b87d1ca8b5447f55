# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton: what the kernels of the threshold quantizer share, standalone or in the fused chain.

A tile is `[LANES, GROUP]`: each thread holds a group of four values that lie side by side in memory. A search
or a sum per segment takes the four one after the other as vectors `[LANES]`, with the bounds (or segments) in
a second dimension that every thread holds whole, so that threads exchange nothing. Counts are kept as floats
(they are small), because a comparison makes a float as cheaply as a truth value.
"""

import triton
import triton.language as tl

LANES = 128  # threads of a program
GROUP = 4
MOST_HELD = 16  # bounds, or segments, that a thread holds at a time; more would not fit its registers


def held_bounds(n: int) -> int:
    """How many of the `n + 1` knots the kernels hold at a time: a power of two."""
    return min(MOST_HELD, int(triton.next_power_of_2(n + 1)))


@triton.jit
def split4(values):
    """The four columns of `[LANES, 4]`."""
    even, odd = tl.split(tl.reshape(values, [values.shape[0], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def join4(first, second, third, fourth):
    """`[LANES, 4]` from its columns."""
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [first.shape[0], 4])


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
def number_of(index, like):
    """A small index in the dtype of `like`: the inverse of `index_of`."""
    if like.dtype == tl.float32:
        return (index | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return index.to(like.dtype)


@triton.jit
def add_to_segments(grad_sum, grad_v_sum, g, v, segment, first, n, HELD: tl.constexpr):
    """Adds `g` and `g v` to the sums `[HELD, LANES]` of the segments from `first` on, one row each.

    A product with 0 or 1 chooses the row. Flat ends are left out first, since their values may be infinite;
    a NaN or an infinite gradient then reaches every row, as it reaches every parameter in the end.
    """
    climbs = (segment > 0) & (segment <= n)
    gv = tl.where(climbs, g * v, 0.0).to(g.dtype)
    rows = (first + tl.arange(0, HELD)).to(segment.dtype)
    mine = (segment[None, :] == rows[:, None]).to(g.dtype)
    nothing = tl.zeros_like(mine)
    grad_sum = tl.fma(mine, nothing + g[None, :], grad_sum)
    return grad_sum, tl.fma(mine, nothing + gv[None, :], grad_v_sum)


@triton.jit
def add_group(grad_sum, grad_v_sum, g, v, segment, first, n, HELD: tl.constexpr):
    """`add_to_segments` of `[LANES, 4]`, column after column."""
    g0, g1, g2, g3 = split4(g)
    v0, v1, v2, v3 = split4(v)
    s0, s1, s2, s3 = split4(segment)
    grad_sum, grad_v_sum = add_to_segments(grad_sum, grad_v_sum, g0, v0, s0, first, n, HELD)
    grad_sum, grad_v_sum = add_to_segments(grad_sum, grad_v_sum, g1, v1, s1, first, n, HELD)
    grad_sum, grad_v_sum = add_to_segments(grad_sum, grad_v_sum, g2, v2, s2, first, n, HELD)
    return add_to_segments(grad_sum, grad_v_sum, g3, v3, s3, first, n, HELD)


@triton.jit
def store_segments(sums_ptr, grad_sum, grad_v_sum, first, n, HELD: tl.constexpr):
    """Writes a program's sums to the rows `1 .. n` of `[n + 2, 2]` float64 that are here."""
    row = first + tl.arange(0, HELD)
    mine = (row > 0) & (row <= n)
    tl.store(sums_ptr + 2 * row, tl.sum(grad_sum.to(tl.float64), axis=1), mask=mine)
    tl.store(sums_ptr + 2 * row + 1, tl.sum(grad_v_sum.to(tl.float64), axis=1), mask=mine)
