"""Loops over units of channels-last maps (`common.rows`): float32 and bfloat16, tables, sums per channel.

Buffers are float32. bfloat16 maps are int16 arrays of its bits, widened and rounded unit by unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from lightning_n2uq.ops.backends.common.jit import Array, compiled, helper
from lightning_n2uq.ops.backends.common.rows import Units


@helper
def span(index: int, form: Units, total: int) -> tuple[int, int, int]:
    """Returns where a unit begins and ends in a map of `total` values, and its place in the tables."""
    start = index // form.parts * form.period
    place = index % form.parts * form.size
    return start + place, min(start + min(place + form.size, form.period), total), place


def loaded(x: Array, begin: int, end: int, room: Array) -> Array:
    """Returns `x[begin:end]` in float32: as it lies there, or bfloat16 widened into `room`."""
    raise NotImplementedError  # compiled functions have `_loaded`


def target(y: Array, begin: int, end: int, room: Array) -> Array:
    """Returns where to write `y[begin:end]`: itself, or for bfloat16 `room`, which `store` rounds."""
    raise NotImplementedError


def store(values: Array, y: Array, begin: int) -> None:
    """Writes to a bfloat16 `y` what was written to its `target`, rounded half to even; NaN stays NaN."""
    raise NotImplementedError


def _direct(x: types.Array) -> bool:
    return x.dtype != types.int16


@overload(loaded, strict=False)
def _loaded(x: Any, begin: Any, end: Any, room: Any) -> Callable[..., Array]:  # noqa: ANN401  # types of numba
    def direct(x: Array, begin: int, end: int, room: Array) -> Array:
        return x[begin:end]

    def widened(x: Array, begin: int, end: int, room: Array) -> Array:
        source, bits = x[begin:end], room[: end - begin].view(np.uint32)
        for i in range(source.size):
            bits[i] = np.uint32(np.uint16(source[i])) << np.uint32(16)
        return room[: end - begin]

    return direct if _direct(x) else widened


@overload(target, strict=False)
def _target(y: Any, begin: Any, end: Any, room: Any) -> Callable[..., Array]:  # noqa: ANN401
    def direct(y: Array, begin: int, end: int, room: Array) -> Array:
        return y[begin:end]

    def buffered(y: Array, begin: int, end: int, room: Array) -> Array:
        return room[: end - begin]

    return direct if _direct(y) else buffered


@overload(store, strict=False)
def _store(values: Any, y: Any, begin: Any) -> Callable[..., None]:  # noqa: ANN401
    def nothing(values: Array, y: Array, begin: int) -> None:
        pass

    def rounded(values: Array, y: Array, begin: int) -> None:
        bits, to = values.view(np.uint32), y[begin : begin + values.size]
        for i in range(bits.size):
            word = bits[i]
            even = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            nan = (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            to[i] = np.int16(np.uint16(np.uint32(0x7FC0) if nan else even))

    return nothing if _direct(y) else rounded


@helper
def tiled(table: Array, form: Units) -> Array:
    """Returns a table `[C, columns]` as `[columns, period]`: its channels over and over."""
    channels, columns = table.shape
    result = np.empty((columns, form.period), table.dtype)
    for k in range(columns):
        for begin in range(0, form.period, channels):
            for c in range(channels):
                result[k, begin + c] = table[c, k]
    return result


@helper
def fold(sums: Array, result: Array) -> None:
    """Adds sums `[kinds, period]` up to `[kinds, C]`, in order."""
    channels = result.shape[1]
    for k in range(result.shape[0]):
        for c in range(channels):
            result[k, c] = sums[k, c]
        for begin in range(channels, sums.shape[1], channels):
            for c in range(channels):
                result[k, c] += sums[k, begin + c]


@helper
def normalize(x: Array, norm: Array, place: int, z: Array) -> None:
    """Writes `z = x * scale + shift`, or a copy; `norm` is tiled."""
    if norm.shape[0] == 0:
        for i in range(x.size):
            z[i] = x[i]
        return
    scale, shift = norm[0, place : place + x.size], norm[1, place : place + x.size]
    for i in range(x.size):
        z[i] = x[i] * scale[i] + shift[i]


@helper
def activate(u: Array, act: Array, place: int, v: Array) -> None:
    """Writes `v = prelu(u + bias) + bias`, leaving `u + bias` in `u`, or a copy; `act` is tiled."""
    if act.shape[0] == 0:
        for i in range(u.size):
            v[i] = u[i]
        return
    bias_in, slope, bias_out = (
        act[0, place : place + u.size],
        act[1, place : place + u.size],
        act[2, place : place + u.size],
    )
    for i in range(u.size):
        u[i] += bias_in[i]
    for i in range(u.size):
        t = u[i]
        v[i] = (t if t > 0 else slope[i] * t) + bias_out[i]


@helper
def activation_gradient(d: Array, u: Array, act: Array, place: int, form: Units, sums: Array) -> None:
    """Turns the gradient `d` of the activation's output into that of its input, in place.

    Adds to `sums` `[4, period]` the gradients of slope and second bias; `input_sums` adds the others.
    """
    if act.shape[0] == 0:
        return
    slope, zero, q = act[1, place : place + d.size], d.dtype.type(0), form.fold
    slope_sum = sums[1, place : place + d.size]
    add(d, form, sums[2, place : place + d.size])
    if q > 0 and d.size == 4 * q:
        for i in range(q):
            a = np.float64(zero if u[i] > 0 else d[i] * u[i])
            b = np.float64(zero if u[q + i] > 0 else d[q + i] * u[q + i])
            e = np.float64(zero if u[2 * q + i] > 0 else d[2 * q + i] * u[2 * q + i])
            f = np.float64(zero if u[3 * q + i] > 0 else d[3 * q + i] * u[3 * q + i])
            slope_sum[i] += (a + b) + (e + f)
    else:
        for i in range(d.size):
            slope_sum[i] += np.float64(zero if u[i] > 0 else d[i] * u[i])
    for i in range(d.size):
        d[i] = d[i] if u[i] > 0 else d[i] * slope[i]


@helper
def input_sums(d: Array, x: Array, mean: Array, place: int, form: Units, sums: Array) -> None:
    """Adds to `sums` `[4, period]` those of `d` and of `d (x - mean)`, the first and the last."""
    add(d, form, sums[0, place : place + d.size])
    add_products(d, x, mean[place : place + d.size], form, sums[3, place : place + d.size])


@helper
def add(d: Array, form: Units, sums: Array) -> None:
    """Adds `d` to `sums`."""
    q = form.fold
    if q > 0 and d.size == 4 * q:
        for i in range(q):
            sums[i] += (np.float64(d[i]) + np.float64(d[q + i])) + (
                np.float64(d[2 * q + i]) + np.float64(d[3 * q + i])
            )
        return
    for i in range(d.size):
        sums[i] += np.float64(d[i])


@helper
def add_products(d: Array, x: Array, mean: Array, form: Units, sums: Array) -> None:
    """Adds `d (x - mean)` to `sums`."""
    q = form.fold
    if q > 0 and d.size == 4 * q:
        for i in range(q):
            m = np.float64(mean[i])
            a = np.float64(d[i]) * (np.float64(x[i]) - m)
            b = np.float64(d[q + i]) * (np.float64(x[q + i]) - m)
            e = np.float64(d[2 * q + i]) * (np.float64(x[2 * q + i]) - m)
            f = np.float64(d[3 * q + i]) * (np.float64(x[3 * q + i]) - m)
            sums[i] += (a + b) + (e + f)
        return
    for i in range(d.size):
        sums[i] += np.float64(d[i]) * (np.float64(x[i]) - np.float64(mean[i]))


@helper
def norm_gradient(d: Array, x: Array, moments: Array, corrections: Array, place: int) -> None:
    """Turns the gradient of a norm's output into that of its input, in place.

    `moments` (mean, 1 / deviation, scale) and `corrections` (offset, tilt) are tiled.
    """
    end = place + d.size
    mean, scale = moments[0, place:end], moments[2, place:end]
    offset, tilt = corrections[0, place:end], corrections[1, place:end]
    for i in range(d.size):
        d[i] = (d[i] - offset[i] - (x[i] - mean[i]) * tilt[i]) * scale[i]


@compiled
def statistics_rows(first: int, last: int, size: int, form: Units, x: Array, sums: Array) -> None:
    """Writes `sum x` and `sum x^2` of the chunks `first .. last - 1`, `size` units each: `[chunks, 2, C]`."""
    room, acc = np.empty(form.size, np.float32), np.empty((2, form.period))
    for chunk in range(first, last):
        acc[:] = 0.0
        for index in range(chunk * size, (chunk + 1) * size):
            begin, end, place = span(index, form, x.size)
            if begin >= end:
                break
            values = loaded(x, begin, end, room)
            total, squares = acc[0, place : place + values.size], acc[1, place : place + values.size]
            for i in range(values.size):
                value = np.float64(values[i])
                total[i] += value
                squares[i] += value * value
        fold(acc, sums[chunk])


@compiled
def norm_gradient_rows(
    first: int, last: int, form: Units, d: Array, x: Array, moments: Array, corrections: Array, dx: Array
) -> None:
    """Writes the gradient of a norm's input for the units `first .. last - 1`.

    `d`, the gradient of its output, is float32, and `dx` itself if that is; it is overwritten.
    """
    xs, ds = np.empty(form.size, np.float32), np.empty(form.size, np.float32)
    table, fixes = tiled(moments, form), tiled(corrections, form)
    for index in range(first, last):
        begin, end, place = span(index, form, x.size)
        value = loaded(d, begin, end, ds)
        norm_gradient(value, loaded(x, begin, end, xs), table, fixes, place)
        store(value, dx, begin)
