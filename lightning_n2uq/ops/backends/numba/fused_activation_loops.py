"""Compiled loops of the fused pre-activation chain: norm, bias, PReLU, bias, quantizer, packing.

A tensor is seen as `[N, C, P]`, `P` pixels to a plane. Work is split by channels, so that everything a norm
needs of a channel stays in one thread's cache and the number of threads changes no bit. All tables are
float32 `[C, columns]`: `norm` holds scale and shift, `act` bias, slope, bias; no columns means no such step.

Codes, and small planes that are worked on together, are `code_loops`'.
"""

from __future__ import annotations

import numpy as np

from lightning_n2uq.ops.backends.common.jit import Array, Number, compiled, helper, summing
from lightning_n2uq.ops.backends.numba.code_loops import (
    PACKED_TOGETHER,
    gather,
    narrow,
    pack,
    pack_planes,
    per_block,
    scatter,
)
from lightning_n2uq.ops.backends.numba.threshold_loops import (
    BLOCK,
    LANES,
    Grid,
    add_lanes,
    add_to_bins,
    count_and_select,
    locate,
    mark_nans,
)


@summing
def plane_sums(x: Array) -> tuple[float, float]:
    """Returns `sum x` and `sum x^2` of one plane, float64."""
    total, squares = 0.0, 0.0
    for i in range(x.size):
        value = np.float64(x[i])
        total += value
        squares += value * value
    return total, squares


@helper
def statistics(x: Array, channel: int) -> tuple[float, float]:
    """Returns mean and (biased) variance of a channel, float64."""
    total, squares = 0.0, 0.0
    for n in range(x.shape[0]):
        a, b = plane_sums(x[n, channel])
        total += a
        squares += b
    number = x.shape[0] * x.shape[2]
    mean = total / number
    variance = squares / number - mean * mean
    return mean, variance if not variance < 0.0 else 0.0


@helper
def normalize(x: Array, norm: Array, z: Array) -> None:
    """Writes `z = x * scale + shift` for one channel's row of `norm`, or a copy."""
    if norm.size == 0:
        for i in range(x.size):
            z[i] = x[i]
    else:
        scale, shift = norm[0], norm[1]
        for i in range(x.size):
            z[i] = x[i] * scale + shift


@helper
def activate(u: Array, act: Array, v: Array) -> None:
    """Writes `v = prelu(u + bias) + bias`, leaving `u + bias` in `u`; a copy without `act`."""
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
def statistics_channels(first: int, last: int, x: Array, stats: Array) -> None:
    """Writes mean and variance of the channels `first .. last - 1` to `stats`, `[2, C]` float64."""
    for c in range(first, last):
        stats[0, c], stats[1, c] = statistics(x, c)


@helper
def has_nan(v: Array, alpha: Number) -> bool:
    """Returns whether an input of the quantizer is NaN."""
    found = np.int32(0)
    for i in range(v.size):
        s = v[i] * alpha
        found |= np.int32(s != s)
    return found != 0


@helper
def forward_block(
    x: Array,
    norm: Array,
    act: Array,
    alpha: Number,
    bounds: Array,
    values: Array,
    u: Array,
    v: Array,
    counts: Array,
    y: Array,
) -> None:
    """Writes output `y`, codes `counts` and the activation's output `v` of one block of one channel."""
    normalize(x, norm, u)
    activate(u, act, v)
    count_and_select(v, alpha, bounds, values, counts, y)


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
    """Writes output `y` and packed codes of the channels `first .. last - 1`."""
    batch, pixels = x.shape[0], x.shape[2]
    row, flag = (pixels + 7) // 8, packed.shape[2] - 1
    together = min(per_block(pixels, PACKED_TOGETHER), batch)
    codes = np.zeros(8 * row * together, np.uint8)
    u, v, c32 = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype), np.empty(BLOCK, np.int32)
    xs, ys, spare = (
        np.empty(BLOCK, x.dtype),
        np.empty(BLOCK, x.dtype),
        np.empty(bits * row * together, np.uint8),
    )
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
                forward_block(
                    source, norm[c], act[c], alpha, bounds, values, u[:size], v[:size], c32[:size], target
                )
                if together == 1:
                    nan |= has_nan(v[:size], alpha)
                    narrow(c32[:size], codes[begin : begin + size])
            if together == 1:
                pack(codes, bits, packed[n, c])
                packed[n, c, flag] = nan
                continue
            scatter(ys, c, n, planes, y)
            part = codes[: 8 * row * planes]
            if planes < together:  # codes of fewer planes lie elsewhere; what pads them has to be 0
                part[:] = 0
            pack_planes(c32, pixels, planes, bits, part, spare)
            for k in range(planes):
                for bit in range(bits):
                    for j in range(row):
                        packed[n + k, c, bit * row + j] = spare[(bit * planes + k) * row + j]
                packed[n + k, c, flag] = has_nan(v[k * pixels : (k + 1) * pixels], alpha)
            if planes < together:
                codes[:] = 0


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


@helper
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


@helper
def backward_block(
    g: Array,
    x: Array,
    norm: Array,
    act: Array,
    mean: Number,
    alpha: Number,
    bounds: Array,
    gains: Array,
    grid: Grid,
    nan_bin: int,
    u: Array,
    v: Array,
    counts: Array,
    lanes: Array,
    sums: Array,
    d: Array,
) -> int:
    """Writes the gradient `d` of the norm's output for one block of one channel; adds to `lanes` and `sums`.

    Returns:
        The number of NaN inputs.
    """
    normalize(x, norm, u)
    activate(u, act, v)
    locate(v, alpha, bounds, gains, grid, counts, d)
    for i in range(d.size):
        d[i] *= g[i]
    nans = mark_nans(v, alpha, nan_bin, counts)
    add_to_bins(g, v, counts, lanes)
    activation_gradient(d, u, x, act, mean, sums)
    return nans


@compiled
def backward_channels(
    first: int,
    last: int,
    size: int,
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
    """Writes the input gradient, histogram `[groups, bins + 1, 2]` and sums `[C, 4]`.

    For the groups `first .. last - 1` of `size` channels each: a histogram per channel would cost more to
    clear and add up than small planes cost to count.
    """
    batch, channels, pixels, rows = x.shape[0], x.shape[1], x.shape[2], bins.shape[1]
    together = min(per_block(pixels, BLOCK), batch)
    u, v, counts = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype), np.empty(BLOCK, np.int32)
    xs, gs, ds = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
    lanes = np.empty((LANES, 2 * (rows - 1)))
    for group in range(first, last):
        lanes[:] = 0.0
        nans = 0
        for c in range(group * size, min((group + 1) * size, channels)):
            mean = moments[c, 0]
            for n in range(0, batch, together):
                planes = min(together, batch - n)
                for begin in range(0, pixels, BLOCK):  # one round where planes are worked on together
                    k = min(BLOCK, pixels - begin) * planes
                    if together == 1:
                        g, source = grad[n, c, begin : begin + k], x[n, c, begin : begin + k]
                        d = dx[n, c, begin : begin + k]
                    else:
                        gather(grad, c, n, planes, gs)
                        gather(x, c, n, planes, xs)
                        g, source, d = gs[:k], xs[:k], ds[:k]
                    nans += backward_block(
                        g,
                        source,
                        norm[c],
                        act[c],
                        mean,
                        alpha,
                        bounds,
                        gains,
                        grid,
                        rows - 2,
                        u[:k],
                        v[:k],
                        counts[:k],
                        lanes,
                        sums[c],
                        d,
                    )
                    if together > 1:
                        scatter(ds, c, n, planes, dx)
            if norm.shape[1] > 0:
                norm_gradient(dx, x, moments[c], batch * pixels, sums[c], c)
        add_lanes(lanes, bins[group])
        bins[group, rows - 1, 0], bins[group, rows - 1, 1] = 0.0, nans
