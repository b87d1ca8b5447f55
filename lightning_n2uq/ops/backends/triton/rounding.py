# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton: random numbers, division by a bucket's norm and stochastic rounding of the gradient codec."""

import triton
import triton.language as tl

from lightning_n2uq.ops.backends.common.rng import GOLDEN, M1, M2
from lightning_n2uq.ops.backends.triton.product import INTERPRETED, divided, product

_GOLDEN, _M1, _M2 = tl.constexpr(GOLDEN), tl.constexpr(M1), tl.constexpr(M2)
ABS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def mix(x, key):
    """Returns `rng._mix` on uint32."""
    x = (x ^ (x >> 16)) * tl.full([], _M1, tl.uint32)
    x = x ^ key
    x = (x ^ (x >> 13)) * tl.full([], _M2, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def weyl(start, position):
    """Returns a word per position: a multiple of the golden ratio away from the start."""
    return start + position.to(tl.uint32) * tl.full([], _GOLDEN, tl.uint32)


@triton.jit
def quotient_of(pattern, norm):
    """Returns `|x| / norm`, the IEEE quotient, by two corrections of an estimate: all share the divisor.

    Both are scaled by a power of two first, so that no step leaves the range of normal numbers unless the
    quotient is below 2**-100, where exponential levels round to zero anyway.
    """
    magnitude = (pattern & ABS).to(tl.float32, bitcast=True)
    if INTERPRETED:
        quotient = magnitude / norm
    else:
        exponent = norm.to(tl.int32, bitcast=True) >> 23
        unit = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)
        divisor = tl.zeros_like(magnitude) + norm * unit
        one = tl.full([1, 1], 1.0, tl.float32)
        inverse = tl.broadcast_to(divided(one, tl.zeros_like(one) + norm * unit), magnitude.shape)
        scaled = magnitude * unit
        quotient = product(scaled, inverse)
        quotient = tl.fma(tl.fma(-divisor, quotient, scaled), inverse, quotient)
        quotient = tl.fma(tl.fma(-divisor, quotient, scaled), inverse, quotient)
    return quotient


@triton.jit
def rounded(
    ratio,
    random,
    levels_ptr,
    inverse_lowest,
    BITS: tl.constexpr,
    FAMILY: tl.constexpr,
    MANTISSA: tl.constexpr,
):
    """Returns magnitude codes (int32) of ratios in 0..1."""
    TOP: tl.constexpr = (1 << (BITS - 1)) - 1
    uniform01 = (random >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)
    if FAMILY == 0:
        SHIFT: tl.constexpr = 23 - MANTISSA
        noise = (random >> (32 - SHIFT)).to(tl.int32)
        code = ((ratio.to(tl.int32, bitcast=True) + noise) >> SHIFT) - ((127 << MANTISSA) - TOP)
        share = tl.minimum(ratio * inverse_lowest, 0.99999994) * 2147483648.0
        up = (random >> 1).to(tl.int32) < share.to(tl.int32)
        return tl.where(ratio < tl.load(levels_ptr + 1), up.to(tl.int32), code)
    if FAMILY == 1:
        scaled = ratio * TOP
        lower = scaled.to(tl.int32)
        return lower + (uniform01 < scaled - lower.to(tl.float32)).to(tl.int32)
    lower = tl.zeros_like(ratio).to(tl.int32)
    for halving in tl.static_range(BITS - 1):
        trial = lower + (1 << (BITS - 2 - halving))
        lower = tl.where((trial < TOP) & (tl.load(levels_ptr + trial) <= ratio), trial, lower)
    low = tl.load(levels_ptr + lower)
    gap = tl.load(levels_ptr + lower + 1) - low
    return lower + (uniform01 < divided(ratio - low, gap)).to(tl.int32)
