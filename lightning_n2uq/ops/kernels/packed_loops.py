"""Compiled loops of the fused pre-activation chain: norm, bias, PReLU, bias, quantizer, packing.

A tensor is seen as `[N, C, P]`, `P` pixels to a plane. Work is split by channels, so that everything a norm
needs of a channel stays in one thread's cache and the number of threads changes no bit. All tables are
float32 `[C, columns]`: `norm` holds scale and shift, `act` bias, slope, bias; no columns means no such step.

Codes of a plane are stored as bit planes: bit `p` of code `j + i * Q` is bit `i` of byte `p * Q + j`, with
`Q = ceil(P / 8)`: neighbouring bytes hold neighbouring codes, so that packing needs no shuffles. One more
byte says whether the plane has a NaN, which no code can say.
"""

from __future__ import annotations

import numpy as np

from lightning_n2uq.ops.kernels.jit import Array, Number, compiled, summing
from lightning_n2uq.ops.kernels.threshold_loops import (
    BLOCK,
    LANES,
    Grid,
    add_lanes,
    add_to_bins,
    count,
    locate,
    mark_nans,
    select,
)


@summing
def plane_sums(x: Array) -> tuple[float, float]:
    """`sum x` and `sum x^2` of one plane, float64."""
    total, squares = 0.0, 0.0
    for i in range(x.size):
        value = np.float64(x[i])
        total += value
        squares += value * value
    return total, squares


@compiled
def statistics(x: Array, channel: int) -> tuple[float, float]:
    """Mean and (biased) variance of a channel, float64."""
    total, squares = 0.0, 0.0
    for n in range(x.shape[0]):
        a, b = plane_sums(x[n, channel])
        total += a
        squares += b
    number = x.shape[0] * x.shape[2]
    mean = total / number
    variance = squares / number - mean * mean
    return mean, variance if not variance < 0.0 else 0.0


@compiled
def normalize(x: Array, norm: Array, z: Array) -> None:
    """`z = x * scale + shift` for one channel's row of `norm`, or a copy."""
    if norm.size == 0:
        for i in range(x.size):
            z[i] = x[i]
    else:
        scale, shift = norm[0], norm[1]
        for i in range(x.size):
            z[i] = x[i] * scale + shift


@compiled
def activate(u: Array, act: Array, v: Array) -> None:
    """`v = prelu(u + bias) + bias`, leaving `u + bias` in `u`; a copy without `act`."""
    if act.size == 0:
        for i in range(u.size):
            v[i] = u[i]
        return
    bias_in, slope, bias_out = act[0], act[1], act[2]
    for i in range(u.size):
        t = u[i] + bias_in
        u[i] = t
        v[i] = (t if t > 0 else slope * t) + bias_out


@compiled
def pack(codes: Array, bits: int, packed: Array) -> None:
    """Packs the codes of a plane, `[8 Q]` uint8, into `bits * Q` bytes."""
    row = codes.size // 8
    for bit in range(bits):
        for j in range(row):
            packed[bit * row + j] = (codes[j] >> bit) & 1
        for i in range(1, 8):
            part = codes[i * row : (i + 1) * row]
            target = packed[bit * row : (bit + 1) * row]
            for j in range(row):
                target[j] |= np.uint8(np.uint8((part[j] >> bit) & 1) << i)


@compiled
def unpack(packed: Array, bits: int, codes: Array) -> None:
    """Undoes `pack`."""
    row = codes.size // 8
    for i in range(8):
        target = codes[i * row : (i + 1) * row]
        for j in range(row):
            target[j] = 0
        for bit in range(bits):
            part = packed[bit * row : (bit + 1) * row]
            for j in range(row):
                target[j] |= np.uint8(np.uint8((part[j] >> i) & 1) << bit)


@compiled
def statistics_channels(first: int, last: int, x: Array, stats: Array) -> None:
    """Mean and variance of the channels `first .. last - 1` into `stats`, `[2, C]` float64."""
    for c in range(first, last):
        stats[0, c], stats[1, c] = statistics(x, c)


@compiled
def forward_channels(
    first: int,
    last: int,
    x: Array,
    norm: Array,
    act: Array,
    alpha: Number,
    bounds: Array,
    values: Array,
    bits: int,
    y: Array,
    packed: Array,
) -> None:
    """Output `y` and packed codes of the channels `first .. last - 1`."""
    pixels = x.shape[2]
    codes = np.zeros((pixels + 7) // 8 * 8, np.uint8)
    u, v, c32 = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype), np.empty(BLOCK, np.int32)
    for c in range(first, last):
        for n in range(x.shape[0]):
            nans = 0
            for begin in range(0, pixels, BLOCK):
                end = min(begin + BLOCK, pixels)
                size = end - begin
                normalize(x[n, c, begin:end], norm[c], u[:size])
                activate(u[:size], act[c], v[:size])
                count(v[:size], alpha, bounds, c32[:size])
                select(v[:size], alpha, bounds, values, y[n, c, begin:end])
                for i in range(size):
                    s = v[i] * alpha
                    nans += 1 if s != s else 0
                    codes[begin + i] = c32[i]
            pack(codes, bits, packed[n, c])
            packed[n, c, packed.shape[2] - 1] = nans > 0


@compiled
def rebuild_channels(first: int, last: int, packed: Array, values: Array, bits: int, y: Array) -> None:
    """Output `y` of the channels `first .. last - 1` from the packed codes: the bits that forward gave."""
    pixels = y.shape[2]
    codes = np.empty((pixels + 7) // 8 * 8, np.uint8)
    for c in range(first, last):
        for n in range(y.shape[0]):
            unpack(packed[n, c], bits, codes)
            row = y[n, c]
            for i in range(pixels):
                row[i] = values[codes[i]]
            if packed[n, c, packed.shape[2] - 1]:
                row[:] = np.nan


@summing
def activation_gradient(d: Array, u: Array, x: Array, act: Array, mean: Number, sums: Array) -> None:
    """Turns the gradient `d` of the activation's output into that of its input, in place.

    Adds to `sums` (float64): gradients of bias, slope, bias, then `sum d (x - mean)`.
    """
    bias_in, slope_sum, bias_out, product = 0.0, 0.0, 0.0, 0.0
    if act.size == 0:
        for i in range(d.size):
            bias_in += np.float64(d[i])
            product += np.float64(d[i]) * (np.float64(x[i]) - np.float64(mean))
    else:
        slope = act[1]
        for i in range(d.size):
            g, t = d[i], u[i]
            inner = g if t > 0 else g * slope
            bias_out += np.float64(g)
            slope_sum += np.float64(np.float32(0) if t > 0 else g * t)
            bias_in += np.float64(inner)
            product += np.float64(inner) * (np.float64(x[i]) - np.float64(mean))
            d[i] = inner
    sums[0] += bias_in
    sums[1] += slope_sum
    sums[2] += bias_out
    sums[3] += product


@compiled
def norm_gradient(d: Array, x: Array, moments: Array, number: int, sums: Array, channel: int) -> None:
    """Turns the gradient of a norm's output into that of its input, in place, for a whole channel.

    `moments` is `mean, 1 / deviation, scale` of the channel; `sums` as `activation_gradient` left it.
    """
    mean, inverse, scale = moments[0], moments[1], moments[2]
    offset = np.float32(sums[0] / number)
    tilt = np.float32(sums[3] * np.float64(inverse) * np.float64(inverse) / number)
    for n in range(x.shape[0]):
        row, source = d[n, channel], x[n, channel]
        for i in range(row.size):
            row[i] = (row[i] - offset - (source[i] - mean) * tilt) * scale


@compiled
def backward_channels(
    first: int,
    last: int,
    grad: Array,
    x: Array,
    norm: Array,
    moments: Array,
    act: Array,
    alpha: Number,
    bounds: Array,
    gains: Array,
    grid: Grid,
    dx: Array,
    bins: Array,
    sums: Array,
) -> None:
    """Input gradient, histogram `[C, bins + 1, 2]` and sums `[C, 4]` of the channels `first .. last - 1`."""
    pixels, rows = x.shape[2], bins.shape[1]
    u, v, counts = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype), np.empty(BLOCK, np.int32)
    lanes = np.empty((LANES, rows - 1, 2))
    for c in range(first, last):
        lanes[:] = 0.0
        nans = 0
        mean = moments[c, 0]
        for n in range(x.shape[0]):
            for begin in range(0, pixels, BLOCK):
                end = min(begin + BLOCK, pixels)
                size = end - begin
                g, d, source = grad[n, c, begin:end], dx[n, c, begin:end], x[n, c, begin:end]
                normalize(source, norm[c], u[:size])
                activate(u[:size], act[c], v[:size])
                locate(v[:size], alpha, bounds, gains, grid, counts[:size], d)
                for i in range(size):
                    d[i] *= g[i]
                nans += mark_nans(v[:size], alpha, rows - 2, counts[:size])
                add_to_bins(g, v[:size], counts[:size], lanes)
                activation_gradient(d, u[:size], source, act[c], mean, sums[c])
        add_lanes(lanes, bins[c])
        bins[c, rows - 1, 0], bins[c, rows - 1, 1] = 0.0, nans
        if norm.shape[1] > 0:
            norm_gradient(dx, x, moments[c], x.shape[0] * pixels, sums[c], c)
