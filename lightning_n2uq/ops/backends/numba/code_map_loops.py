"""Compiled loops of the fused chain where its result is a map of codes, one byte each, and no floats.

An integer convolution reads the codes as they are; the backward pass keeps them packed.
"""

from __future__ import annotations

import numpy as np

from lightning_n2uq.ops.backends.common.jit import Array, Number, compiled, helper
from lightning_n2uq.ops.backends.numba.code_loops import (
    PACKED_TOGETHER,
    gather,
    narrow,
    pack,
    pack_planes,
    per_block,
    scatter,
)
from lightning_n2uq.ops.backends.numba.fused_activation_loops import activate, has_nan, normalize
from lightning_n2uq.ops.backends.numba.threshold_loops import BLOCK


@helper
def count(x: Array, alpha: Number, bounds: Array, counts: Array) -> None:
    """Sets `counts[i]` to the number of bounds below `alpha * x[i]`; `bounds` is padded to fours."""
    for i in range(x.size):
        counts[i] = 0
    for k in range(0, bounds.size, 4):
        a, b, c, d = bounds[k], bounds[k + 1], bounds[k + 2], bounds[k + 3]
        for i in range(x.size):
            s = x[i] * alpha
            counts[i] += np.int32(s > a) + np.int32(s > b) + np.int32(s > c) + np.int32(s > d)


@compiled
def code_channels(
    first: int,
    last: int,
    x: Array,
    norm: Array,
    act: Array,
    alpha: Number,
    bounds: Array,
    bits: int,
    y: Array,
    packed: Array,
) -> None:
    """Writes codes `y` and packed codes of the channels `first .. last - 1`; the code of a NaN is 0."""
    batch, pixels = x.shape[0], x.shape[2]
    row, flag = (pixels + 7) // 8, packed.shape[2] - 1
    together = min(per_block(pixels, PACKED_TOGETHER), batch)
    u, v, counts = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype), np.empty(BLOCK, np.int32)
    xs, ys = np.empty(BLOCK, x.dtype), np.empty(BLOCK, np.uint8)
    codes, spare = np.zeros(8 * row * together, np.uint8), np.empty(bits * row * together, np.uint8)
    for c in range(first, last):
        for n in range(0, batch, together):
            planes = min(together, batch - n)
            nan = False
            for begin in range(0, pixels, BLOCK):  # one round where planes are worked on together
                size = min(BLOCK, pixels - begin) * planes
                if together == 1:
                    source, target = x[n, c, begin : begin + size], y[n, c, begin : begin + size]
                else:
                    gather(x, c, n, planes, xs)
                    source, target = xs[:size], ys[:size]
                normalize(source, norm[c], u[:size])
                activate(u[:size], act[c], v[:size])
                count(v[:size], alpha, bounds, counts[:size])
                narrow(counts[:size], target)
                if together == 1:
                    nan |= has_nan(v[:size], alpha)
            if together == 1:
                codes[:pixels] = y[n, c]
                pack(codes, bits, packed[n, c])
                packed[n, c, flag] = nan
                continue
            scatter(ys, c, n, planes, y)
            part = codes[: 8 * row * planes]
            part[:] = 0
            pack_planes(ys, pixels, planes, bits, part, spare)
            for k in range(planes):
                for bit in range(bits):
                    for j in range(row):
                        packed[n + k, c, bit * row + j] = spare[(bit * planes + k) * row + j]
                packed[n + k, c, flag] = has_nan(v[k * pixels : (k + 1) * pixels], alpha)
