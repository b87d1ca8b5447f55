"""Compiled loops over maps of bytes: their largest values under a window, and their sums."""

from __future__ import annotations

import numpy as np

from lightning_n2uq.ops.backends.common.jit import Array, compiled, helper


@helper
def _raise(best: Array, value: Array) -> None:
    for j in range(best.size):
        best[j] = max(best[j], value[j])


@compiled
def pool_rows(
    first: int, last: int, x: Array, kernel: Array, stride: Array, pads: Array, dilation: Array, y: Array
) -> None:
    """Writes rows `first .. last - 1`, through all samples, of a max pooling with zeros around.

    Args:
        first: The first row.
        last: The row behind the last one.
        x: `[N, H, W C]` uint8.
        kernel: Height and width of the windows.
        stride: Their steps.
        pads: Zeros at the top and at the left.
        dilation: Distances inside a window.
        y: `[N, H', W', C]` uint8.
    """
    rows, columns, channels = y.shape[1], y.shape[2], y.shape[3]
    height, width = x.shape[1], x.shape[2] // channels
    best = np.empty(x.shape[2], np.uint8)
    for chunk in range(first, last):
        sample, i = chunk // rows, chunk % rows
        best[:] = 0
        for a in range(kernel[0]):
            row = i * stride[0] - pads[0] + a * dilation[0]
            if 0 <= row < height:
                _raise(best, x[sample, row])
        for j in range(columns):
            pixel = y[sample, i, j]
            pixel[:] = 0
            for b in range(kernel[1]):
                column = j * stride[1] - pads[1] + b * dilation[1]
                if 0 <= column < width:
                    _raise(pixel, best[column * channels : (column + 1) * channels])


@helper
def _accumulate(total: Array, values: Array) -> None:
    for c in range(total.size):
        total[c] += np.float32(values[c])


@compiled
def sum_pixels(first: int, last: int, x: Array, y: Array) -> None:
    """Writes the sums over the pixels of samples `first .. last - 1`: `[N, pixels, C]` to `[N, C]`."""
    for sample in range(first, last):
        y[sample] = 0
        for pixel in range(x.shape[1]):
            _accumulate(y[sample], x[sample, pixel])
