"""Compiled loops of the stem: batch norm, ReLU, max pooling.

Tensors and tables as in `fused_activation_loops`; work is split by channels.
"""

from __future__ import annotations

import numpy as np

from lightning_n2uq.ops.backends.common.jit import Array, Number, compiled, helper
from lightning_n2uq.ops.backends.numba.fused_activation_loops import (
    activation_gradient,
    norm_gradient,
    normalize,
)


@helper
def _by_phase(z: Array, phases: Array) -> None:
    """Copies column `j` to `phases[j % stride, j // stride]`: equal columns of windows lie side by side."""
    stride = phases.shape[0]
    if stride == 2:  # by far the most common, and a constant is what lets the loop use vector units
        even, odd = phases[0], phases[1]
        for j in range(z.size // 2):
            even[j], odd[j] = z[2 * j], z[2 * j + 1]
        if z.size % 2:
            even[z.size // 2] = z[z.size - 1]
    else:
        for j in range(z.size):
            phases[j % stride, j // stride] = z[j]


@helper
def _raise(best: Array, tap: Array, value: Array, number: Number) -> None:
    """Puts larger values, and NaN, into `best`, and their number into `tap`."""
    for j in range(best.size):
        better = (value[j] > best[j]) | (value[j] != value[j])
        best[j] = value[j] if better else best[j]
        tap[j] = number if better else tap[j]


@helper
def _raise_row(best: Array, tap: Array, value: Array, inner: Array, first: Number) -> None:
    """Calls `_raise` with a row of windows, whose own taps are `inner`."""
    for j in range(best.size):
        better = (value[j] > best[j]) | (value[j] != value[j])
        best[j] = value[j] if better else best[j]
        tap[j] = inner[j] + first if better else tap[j]


@helper
def _pool_row(phases: Array, width: int, kernel: int, padding: int, best: Array, tap: Array) -> None:
    """Writes the maximum of every window's columns in one row of `width` pixels; taps are float32 numbers."""
    stride = phases.shape[0]
    for j in range(best.size):
        best[j], tap[j] = -np.inf, 0
    for b in range(kernel):
        left = max(0, -((b - padding) // stride))
        right = min(best.size, (width - 1 - b + padding) // stride + 1)
        if left < right:
            phase, shift = (b - padding) % stride, (b - padding) // stride
            source = phases[phase, left + shift : right + shift]
            _raise(best[left:right], tap[left:right], source, np.float32(b))


@compiled
def stem_forward(
    first: int,
    last: int,
    x: Array,
    norm: Array,
    kernel: int,
    stride: int,
    padding: int,
    y: Array,
    taps: Array,
) -> None:
    """Writes the max pooling of `relu(norm(x))`, `[N, C, H, W]`, for the channels `first .. last - 1`.

    `taps`: where in the window the maximum is, the first of equals. Rows are pooled before columns, so that a
    row that two windows share is pooled once.
    """
    height, width = x.shape[2], x.shape[3]
    rows, columns = y.shape[2], y.shape[3]
    z, zero = np.empty(width, x.dtype), x.dtype.type(0)
    phases = np.empty((stride, (width + stride - 1) // stride), x.dtype)
    best, inner = np.empty((height, columns), x.dtype), np.empty((height, columns), np.float32)
    tap = np.empty(columns, np.float32)
    for c in range(first, last):
        for n in range(x.shape[0]):
            for i in range(height):
                normalize(x[n, c, i], norm[c], z)
                for j in range(width):
                    z[j] = zero if z[j] <= 0 else z[j]
                _by_phase(z, phases)
                _pool_row(phases, width, kernel, padding, best[i], inner[i])
            for i in range(rows):
                target, places = y[n, c, i], taps[n, c, i]
                for j in range(columns):
                    target[j], tap[j] = -np.inf, 0
                for a in range(kernel):
                    row = i * stride + a - padding
                    if 0 <= row < height:
                        _raise_row(target, tap, best[row], inner[row], np.float32(a * kernel))
                for j in range(columns):
                    places[j] = np.uint8(tap[j])


@compiled
def stem_backward(
    first: int,
    last: int,
    grad: Array,
    taps: Array,
    x: Array,
    norm: Array,
    moments: Array,
    kernel: int,
    stride: int,
    padding: int,
    dx: Array,
    sums: Array,
) -> None:
    """Writes the input gradient and sums `[C, 4]` of `stem_forward`."""
    height, width = x.shape[2], x.shape[3]
    u, no_act, zero = np.empty(width, x.dtype), np.empty(0, x.dtype), x.dtype.type(0)
    flat = x.reshape(x.shape[0], x.shape[1], height * width)
    offsets = np.empty(kernel * kernel, np.int64)
    for tap in range(offsets.size):
        offsets[tap] = tap // kernel * width + tap % kernel
    for c in range(first, last):
        for n in range(x.shape[0]):
            plane = dx[n, c]
            pixels = plane.reshape(height * width)
            for j in range(pixels.size):
                pixels[j] = 0
            for i in range(grad.shape[2]):
                source, places = grad[n, c, i], taps[n, c, i]
                corner = (i * stride - padding) * width - padding
                for j in range(source.size):
                    pixels[np.uint64(corner + j * stride + offsets[places[j]])] += source[j]
            for i in range(height):
                normalize(x[n, c, i], norm[c], u)
                d = plane[i]
                for j in range(width):
                    d[j] = zero if u[j] <= 0 else d[j]
                activation_gradient(d, u, x[n, c, i], no_act, moments[c, 0], sums[c])
        norm_gradient(dx.reshape(flat.shape), flat, moments[c], x.shape[0] * height * width, sums[c], c)
