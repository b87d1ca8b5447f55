"""Full-precision weights as integers whose sums are exact in any order of additions.

The published networks keep their first and last layer in float. Floating-point sums depend on the order of
additions, which differs between engines, thread counts and batch sizes; one rounding near a threshold then
flips a code further down. With inputs and weights on a grid, fine enough not to matter, the sums are integers
below the accumulator's limit, so that every engine gets the same bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_n2uq.export.lower.deferred import Float64

FLOAT32_BITS, FLOAT64_BITS = 24, 53
WEIGHT_BITS = 21
"""Magnitude bits of weights in float64 sums."""


def _powers(weight: Float64) -> Float64:
    """By output channel: a power of two at or above the largest magnitude (1 for zeros), `[O, 1, ..]`."""
    largest = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True)
    power: Float64 = np.exp2(np.ceil(np.log2(np.where(largest > 0, largest, 1.0))))
    return power


def _largest_sum(weight: Float64) -> float:
    return float(np.abs(weight).reshape(len(weight), -1).sum(1).max(initial=1.0))


def fixed_linear(weight: Float64) -> tuple[NDArray[np.int32], int, Float64]:
    """Integers `[O, I]`, the input's magnitude bits (24 at most), and the scale of the sums `[O]`."""
    power = _powers(weight)
    integers = np.rint(weight / power * 2.0**WEIGHT_BITS)
    bits = min(FLOAT32_BITS, FLOAT64_BITS - int(np.ceil(np.log2(_largest_sum(integers)))))
    return integers.astype(np.int32), bits, (power * 2.0**-WEIGHT_BITS).reshape(-1)


def split_conv(weight: Float64) -> tuple[NDArray[np.float32], NDArray[np.float32], int, int, Float64]:
    """High and low weights, high and low bits of the input, scale of the sums `[O]` (see `SplitConv`).

    The product of high parts gets the 24 bits that float32 sums exactly, shared evenly between weights and
    input; low parts get what then still fits.
    """
    power = _powers(weight)
    unit = weight / power
    spread = int(np.ceil(np.log2(_largest_sum(unit))))
    weight_bits = (FLOAT32_BITS - spread) // 2
    high = np.rint(unit * 2.0**weight_bits)
    input_bits = FLOAT32_BITS - int(np.ceil(np.log2(_largest_sum(high))))
    rest = unit * 2.0**weight_bits - high
    low_bits = next(
        q for q in range(FLOAT32_BITS, -1, -1)
        if _largest_sum(np.rint(rest * 2.0**q)) * 2.0**input_bits <= 2.0**FLOAT32_BITS
    )  # fmt: skip
    low = np.rint(rest * 2.0**low_bits) * 2.0**-low_bits
    scale = (power * 2.0**-weight_bits).reshape(-1)
    # The input's low part is at most one half: one more bit than its high part.
    return high.astype(np.float32), low.astype(np.float32), input_bits, input_bits + 1, scale
