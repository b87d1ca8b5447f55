"""Compiled loops of a split convolution on 16-bit integers: the input's parts, and rows of the output."""

from __future__ import annotations

import numpy as np

from lightning_n2uq.export.runtime.fast.split_tile import PIXELS, split_tile
from lightning_n2uq.export.runtime.fast.vectors import LANES
from lightning_n2uq.ops.backends.common.jit import Array, Number, compiled, helper


@compiled
def split_rows(
    first: int,
    last: int,
    x: Array,
    scales: Array,
    low_bits: int,
    top: int,
    left: int,
    high: Array,
    low: Array,
) -> None:
    """Writes rows `first .. last - 1`, counted through all samples, of an input's parts.

    Args:
        first: The first row of the result.
        last: The row behind the last one.
        x: `[N, H, W C]` float32.
        scales: One per sample.
        low_bits: Binary places of the low part, which is written as an integer.
        top: Rows of zeros above.
        left: Zeros at the left.
        high: `[N, H', W' C]` int16.
        low: Likewise.
    """
    rows, height, width = high.shape[1], x.shape[1], x.shape[2]
    up = np.float32(2.0**low_bits)
    for chunk in range(first, last):
        sample, i = chunk // rows, chunk % rows
        u, v = high[sample, i], low[sample, i]
        u[:] = 0
        v[:] = 0
        if top <= i < top + height:
            source, scale = x[sample, i - top], scales[sample]
            u, v = u[left : left + width], v[left : left + width]
            for j in range(width):
                unit = source[j] / scale
                whole = np.rint(unit)
                u[j] = np.int16(whole)
                v[j] = np.int16(np.rint((unit - whole) * up))


@helper
def convolve_row(
    addresses: Array,
    sizes: Array,
    steps: Array,
    sample: int,
    i: int,
    scale: Number,
    weight_unit: Number,
    input_unit: Number,
    y: Array,
) -> None:
    """Writes a sample's row `i` of a split convolution to `y` `[W', O]`; the rest is `convolve_rows`'."""
    width, channels = y.shape
    edge = np.empty((PIXELS, LANES), np.float32)
    block_bytes = sizes[0] * sizes[1] * 8 * LANES
    start = sample * steps[0] + i * steps[1]
    for channel in range(0, channels, LANES):
        weights = addresses[2] + channel // LANES * block_bytes
        for j in range(0, width, PIXELS):
            place = start + j * steps[2]
            whole = j + PIXELS <= width and channel + LANES <= channels
            output = y.ctypes.data + 4 * (j * channels + channel) if whole else edge.ctypes.data
            split_tile(
                addresses[0] + place, addresses[1] + place, weights, output, sizes[0], sizes[1],
                steps[3], steps[2], 4 * channels if whole else 4 * LANES, scale, weight_unit, input_unit,
            )  # fmt: skip
            if not whole:
                for p in range(min(PIXELS, width - j)):
                    for c in range(min(LANES, channels - channel)):
                        y[j + p, channel + c] = edge[p, c]


@compiled
def convolve_rows(
    first: int,
    last: int,
    addresses: Array,
    sizes: Array,
    steps: Array,
    scales: Array,
    weight_unit: Number,
    input_unit: Number,
    y: Array,
) -> None:
    """Writes rows `first .. last - 1`, counted through all samples, of a split convolution.

    Args:
        first: The first row.
        last: The row behind the last one.
        addresses: Of the input's high parts, of its low parts, of the weights.
        sizes: Rows of the kernel, pairs of numbers in one of them.
        steps: Bytes from one sample of the input to the next, from the window of one row of the output to the
            next, from one pixel's window to the next, from one row of the input to the next.
        scales: One per sample.
        weight_unit: Value of a one in the low weights.
        input_unit: Value of a one in the low parts.
        y: The output, `[N, H', W', O]` float32.
    """
    height = y.shape[1]
    for chunk in range(first, last):
        sample, i = chunk // height, chunk % height
        convolve_row(
            addresses, sizes, steps, sample, i, scales[sample], weight_unit, input_unit, y[sample, i]
        )
