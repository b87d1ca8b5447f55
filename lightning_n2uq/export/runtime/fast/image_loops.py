"""Compiled loops over the images in front of a full-precision convolution: their scale, and their parts."""

from __future__ import annotations

import numpy as np

from lightning_n2uq.ops.backends.common.jit import Array, compiled


@compiled
def largest(first: int, last: int, x: Array, result: Array) -> None:
    """Writes the bits of the largest magnitude of each part of `x`, `[parts, size]` int32 bits of float32.

    Magnitudes have the order of their bits, and NaN is above all.
    """
    for part in range(first, last):
        best, values = np.int32(0), x[part]
        for i in range(values.size):
            magnitude = np.int32(values[i] & np.int32(0x7FFFFFFF))  # numba makes 64 bits of it
            best = magnitude if magnitude > best else best
        result[part] = best


@compiled
def split_image(
    first: int,
    last: int,
    x: Array,
    scales: Array,
    low_bits: int,
    fold: int,
    pads: Array,
    high: Array,
    low: Array,
) -> None:
    """Writes high and low parts of images, `fold` by `fold` pixels side by side in one pixel's channels.

    Args:
        first: The first row of the result, counted through all samples.
        last: The row behind the last one.
        x: `[N, C, H, W]` float32.
        scales: One per sample.
        low_bits: Binary places of the low part.
        fold: Height and width of the blocks of pixels.
        pads: Zeros above and at the left.
        high: `[N, H', W', fold * fold * C]`.
        low: Likewise.
    """
    channels, height, width = x.shape[1], x.shape[2], x.shape[3]
    rows, up, down = high.shape[1], np.float32(2.0**low_bits), np.float32(2.0**-low_bits)
    u, v = np.empty(width, np.float32), np.empty(width, np.float32)
    for chunk in range(first, last):
        sample, i = chunk // rows, chunk % rows
        high[sample, i] = 0
        low[sample, i] = 0
        for dy in range(fold):
            row = i * fold + dy - pads[0]
            if row < 0 or row >= height:
                continue
            for c in range(channels):
                source, scale = x[sample, c, row], scales[sample]
                for j in range(width):
                    unit = source[j] / scale
                    whole = np.rint(unit)
                    u[j] = whole
                    v[j] = np.rint((unit - whole) * up) * down
                for j in range(width):
                    column = j + pads[1]
                    place, channel = column // fold, (dy * fold + column % fold) * channels + c
                    if place < high.shape[2]:
                        high[sample, i, place, channel] = u[j]
                        low[sample, i, place, channel] = v[j]
