"""A max pooling of what a program leaves in register 0, whose map is made row by row and never written.

The program may begin with a split convolution: its rows are then made on the way, too.
"""

from __future__ import annotations

import numpy as np

from lightning_n2uq.export.runtime.fast.loops import REGISTERS, run_block
from lightning_n2uq.export.runtime.fast.split_loops import convolve_row
from lightning_n2uq.ops.backends.common.jit import Array, Number, compiled, helper


@helper
def _raise(best: Array, value: Array) -> None:
    """Puts larger values, and NaN, into `best`."""
    for j in range(best.size):
        better = (value[j] > best[j]) | (value[j] != value[j])
        best[j] = value[j] if better else best[j]


@helper
def _pool_row(best: Array, y: Array, width: int, kernel: int, stride: int, pad: int, dilation: int) -> None:
    """Writes a row `[W', C]` of windows from the largest values of each column, `best` `[width C]`."""
    columns, channels = y.shape
    for j in range(columns):
        pixel = y[j]
        pixel[:] = -np.inf
        for b in range(kernel):
            column = j * stride - pad + b * dilation
            if 0 <= column < width:
                _raise(pixel, best[column * channels : (column + 1) * channels])


@compiled
def run_pool(
    first: int,
    last: int,
    program: Array,
    params: Array,
    addresses: Array,
    spans: Array,
    scales: Array,
    y: Array,
    height: int,
    width: int,
    kernel: Array,
    stride: Array,
    pads: Array,
    dilation: Array,
    channels: int,
    period: int,
    stem: int,
    parts: Array,
    sizes: Array,
    steps: Array,
    weight_unit: Number,
    input_unit: Number,
) -> None:
    """Writes rows `first .. last - 1` of a max pooling of what a program leaves in register 0.

    Args:
        first: The first row, counted through all samples.
        last: The row behind the last one.
        program: As for `run_program`, like the following.
        params: Per-channel numbers.
        addresses: Of all maps.
        spans: Values per sample of all maps.
        scales: One number per sample.
        y: The pooled map, `[N, H', W', C]`.
        height: Rows of the program's map.
        width: Its columns.
        kernel: Height and width of the windows.
        stride: Their steps.
        pads: Minus infinity around the map: at the top, at the left.
        dilation: Distances inside a window.
        channels: Number of channels.
        period: Of `params`.
        stem: Number of the operand that is a split convolution, or -1; its map needs no address.
        parts: The addresses of the split convolution, as for `convolve_rows`.
        sizes: As for `convolve_rows`, like the following.
        steps: Bytes from one part of the input to another.
        weight_unit: Value of a one in the low weights.
        input_unit: Value of a one in the low parts.
    """
    length, rows = width * channels, y.shape[1]
    scratch, counts = np.empty((REGISTERS, length), np.float32), np.empty(period, np.int32)
    held = (kernel[0] - 1) * dilation[0] + 1
    ring, held_rows = np.empty((held, length), np.float32), np.full(held, -1, np.int64)
    best, places = np.empty(length, np.float32), addresses.copy()
    sums = np.empty((width if stem >= 0 else 0, channels), np.float32)
    for chunk in range(first, last):
        sample, i = chunk // rows, chunk % rows
        best[:] = -np.inf
        for a in range(kernel[0]):
            row = i * stride[0] - pads[0] + a * dilation[0]
            if row < 0 or row >= height:
                continue
            place = row % held
            if held_rows[place] != sample * height + row:
                if stem >= 0:
                    convolve_row(
                        parts, sizes, steps, sample, row, scales[sample], weight_unit, input_unit, sums
                    )
                    # So that the program, which looks for this row in its map, finds the one at hand.
                    places[stem] = sums.ctypes.data - 4 * (sample * spans[stem] + row * length)
                run_block(
                    program, params, places, spans, scratch, counts, scales,
                    sample, row * length, length, channels, period,
                )  # fmt: skip
                ring[place] = scratch[0]
                held_rows[place] = sample * height + row
            _raise(best, ring[place])
        _pool_row(best, y[sample, i], width, kernel[1], stride[1], pads[1], dilation[1])
