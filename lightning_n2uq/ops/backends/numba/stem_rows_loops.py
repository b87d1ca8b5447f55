"""Compiled loops of the stem (batch norm, ReLU, max pooling) on channels-last maps, `[N, H, W, C]`.

Maps are float32 or bfloat16 bits, cut into rows of pixels, `W C` values each; tables `[C, columns]`.
"""

from __future__ import annotations

import numpy as np

from lightning_n2uq.ops.backends.common.jit import Array, compiled, helper
from lightning_n2uq.ops.backends.numba.row_loops import loaded, store, target
from lightning_n2uq.ops.backends.numba.stem_loops import _raise, _raise_row


@helper
def _normalize_row(x: Array, norm: Array, u: Array) -> None:
    """Writes `u = x * scale + shift` of a row of pixels."""
    channels = norm.shape[0]
    scale, shift = norm[:, 0].copy(), norm[:, 1].copy()
    for begin in range(0, u.size, channels):
        source, result = x[begin : begin + channels], u[begin : begin + channels]
        for c in range(channels):
            result[c] = source[c] * scale[c] + shift[c]


@helper
def _window(length: int, tap: int, stride: int, padding: int, outputs: int) -> tuple[int, int]:
    """Returns the first output whose window's `tap` lies inside, and the one behind the last."""
    return max(0, -((tap - padding) // stride)), min(outputs, (length - 1 - tap + padding) // stride + 1)


@helper
def _pool_row(
    z: Array, channels: int, kernel: int, stride: int, padding: int, best: Array, tap: Array
) -> None:
    """Writes the maximum of every window's columns in one row of pixels; taps are float32 numbers."""
    for i in range(best.size):
        best[i], tap[i] = -np.inf, 0
    columns = best.size // channels
    for b in range(kernel):
        left, right = _window(z.size // channels, b, stride, padding, columns)
        for j in range(left, right):
            at, begin = j * channels, (j * stride + b - padding) * channels
            _raise(
                best[at : at + channels], tap[at : at + channels], z[begin : begin + channels], np.float32(b)
            )


@compiled
def stem_forward_rows(
    first: int,
    last: int,
    size: int,
    x: Array,
    norm: Array,
    kernel: int,
    stride: int,
    padding: int,
    y: Array,
    taps: Array,
) -> None:
    """Writes the max pooling of `relu(norm(x))` and its taps for bands `first .. last - 1`.

    A band is `size` rows of an image's output. `taps`: where in the window the maximum is, the first of
    equals.
    """
    height, width, channels = x.shape[1], x.shape[2], x.shape[3]
    rows, length = y.shape[1], y.shape[2] * channels
    bands = (rows + size - 1) // size
    source, result, places = x.reshape(-1), y.reshape(-1), taps.reshape(-1)
    room, z = np.empty(width * channels, np.float32), np.empty(width * channels, np.float32)
    best, inner = np.empty((kernel, length), np.float32), np.empty((kernel, length), np.float32)
    out, tap, zero = np.empty(length, np.float32), np.empty(length, np.float32), np.float32(0)
    for band in range(first, last):
        n, begin = band // bands, band % bands * size
        done = max(0, begin * stride - padding)  # rows of the input, pooled into `best` in turn
        for i in range(begin, min(begin + size, rows)):
            low, high = max(0, i * stride - padding), min(height, i * stride - padding + kernel)
            done = max(done, low)
            while done < high:
                at = (n * height + done) * z.size
                _normalize_row(loaded(source, at, at + z.size, room), norm, z)
                for j in range(z.size):
                    z[j] = zero if z[j] <= 0 else z[j]
                _pool_row(z, channels, kernel, stride, padding, best[done % kernel], inner[done % kernel])
                done += 1
            at = (n * rows + i) * length
            values = target(result, at, at + length, out)
            for j in range(length):
                values[j], tap[j] = -np.inf, 0
            for row in range(low, high):
                a = row - i * stride + padding
                _raise_row(values, tap, best[row % kernel], inner[row % kernel], np.float32(a * kernel))
            store(values, result, at)
            chosen = places[at : at + length]
            for j in range(length):
                chosen[j] = np.uint8(tap[j])


@helper
def _add_tap(d: Array, g: Array, taps: Array, tap: np.uint8) -> None:
    """Adds to `d` the gradients of the maxima that were found at `tap`."""
    for c in range(d.size):
        d[c] += g[c] if taps[c] == tap else np.float32(0)


@helper
def _gradient_row(
    row: int, n: int, grad: Array, taps: Array, u: Array, size: tuple[int, int, int, int],
    window: tuple[int, int, int], room: Array, d: Array,
) -> None:  # fmt: skip
    """Writes the gradient `d` of a norm's output row, which is `u`, in the reference's order of additions."""
    rows, columns, width, channels = size
    kernel, stride, padding = window
    d[:] = np.float32(0)
    for i in range(max(0, (row + padding - kernel) // stride + 1), min(rows, (row + padding) // stride + 1)):
        a = row - i * stride + padding
        at = (n * rows + i) * columns * channels
        g, places = loaded(grad, at, at + columns * channels, room), taps[at : at + columns * channels]
        for b in range(kernel - 1, -1, -1):  # so that a pixel's windows come from left to right
            left, right = _window(width, b, stride, padding, columns)
            tap = np.uint8(a * kernel + b)
            for j in range(left, right):
                to, begin = (j * stride + b - padding) * channels, j * channels
                _add_tap(
                    d[to : to + channels],
                    g[begin : begin + channels],
                    places[begin : begin + channels],
                    tap,
                )
    for j in range(d.size):
        d[j] = np.float32(0) if u[j] <= 0 else d[j]


@compiled
def stem_sums_rows(
    first: int,
    last: int,
    size: int,
    grad: Array,
    taps: Array,
    x: Array,
    norm: Array,
    moments: Array,
    kernel: int,
    stride: int,
    padding: int,
    sums: Array,
) -> None:
    """Writes the sums `[chunks, 4, C]` of `stem_backward_rows`: first and last of four, zeros between."""
    height, width, channels = x.shape[1], x.shape[2], x.shape[3]
    shape, window = (grad.shape[1], grad.shape[2], width, channels), (kernel, stride, padding)
    source, upstream, places = x.reshape(-1), grad.reshape(-1), taps.reshape(-1)
    length = width * channels
    xs, u, d = np.empty(length, np.float32), np.empty(length, np.float32), np.empty(length, np.float32)
    room, means = np.empty(grad.shape[2] * channels, np.float32), moments[:, 0].astype(np.float64)
    for chunk in range(first, last):
        sums[chunk] = 0.0
        total, product = sums[chunk, 0], sums[chunk, 3]
        for row in range(chunk * size, min((chunk + 1) * size, x.shape[0] * height)):
            values = loaded(source, row * length, (row + 1) * length, xs)
            _normalize_row(values, norm, u)
            _gradient_row(row % height, row // height, upstream, places, u, shape, window, room, d)
            for begin in range(0, length, channels):
                inner, pixel = d[begin : begin + channels], values[begin : begin + channels]
                for c in range(channels):
                    total[c] += np.float64(inner[c])
                for c in range(channels):
                    product[c] += np.float64(inner[c]) * (np.float64(pixel[c]) - means[c])


@compiled
def stem_backward_rows(
    first: int,
    last: int,
    grad: Array,
    taps: Array,
    x: Array,
    norm: Array,
    moments: Array,
    fixes: Array,
    kernel: int,
    stride: int,
    padding: int,
    dx: Array,
) -> None:
    """Writes the input gradient of `stem_forward_rows` for the rows of pixels `first .. last - 1`."""
    height, width, channels = x.shape[1], x.shape[2], x.shape[3]
    shape, window = (grad.shape[1], grad.shape[2], width, channels), (kernel, stride, padding)
    source, upstream, places, results = x.reshape(-1), grad.reshape(-1), taps.reshape(-1), dx.reshape(-1)
    length = width * channels
    xs, u, d = np.empty(length, np.float32), np.empty(length, np.float32), np.empty(length, np.float32)
    room, out = np.empty(grad.shape[2] * channels, np.float32), np.empty(length, np.float32)
    mean, scale = moments[:, 0].copy(), moments[:, 2].copy()
    offset, tilt = fixes[:, 0].copy(), fixes[:, 1].copy()
    for row in range(first, last):
        values = loaded(source, row * length, (row + 1) * length, xs)
        _normalize_row(values, norm, u)
        _gradient_row(row % height, row // height, upstream, places, u, shape, window, room, d)
        result = target(results, row * length, (row + 1) * length, out)
        for begin in range(0, length, channels):
            inner, pixel = d[begin : begin + channels], values[begin : begin + channels]
            to = result[begin : begin + channels]
            for c in range(channels):
                to[c] = (inner[c] - offset[c] - (pixel[c] - mean[c]) * tilt[c]) * scale[c]
        store(result, results, row * length)
