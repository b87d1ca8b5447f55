"""Compiled loops of the activation quantizer on one block or on a range of chunks (see `numba.threshold`).

Bounds increase, so that the last one below an input decides: selects over four bounds at a time, which the
compiler turns into vector compares and blends. Many bounds are found through a grid of equal cells instead.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from lightning_n2uq.ops.backends.common.jit import Array, Number, compiled, helper

Grid: TypeAlias = "tuple[Number, Number, Array, int]"  # origin, cells per unit, cells, most bounds in a cell
Ramps: TypeAlias = "tuple[Array, Array, Number]"  # where ramps begin, their slopes, output step

BLOCK = 512  # elements worked on at a time: a handful of such buffers stay in the first-level cache
LANES = 8  # histograms side by side: neighbours in one bin would wait for each other's addition


@helper
def select(x: Array, alpha: Number, bounds: Array, values: Array, y: Array) -> None:
    """Sets `y[i] = values[number of bounds below alpha * x[i]]`, NaN for NaN; `bounds` padded to fours."""
    a, b, c, d = bounds[0], bounds[1], bounds[2], bounds[3]
    v0, v1, v2, v3, v4 = values[0], values[1], values[2], values[3], values[4]
    for i in range(x.size):
        s = x[i] * alpha
        v = v1 if s > a else v0
        v = v2 if s > b else v
        v = v3 if s > c else v
        v = v4 if s > d else v
        y[i] = v if s == s else s
    for k in range(4, bounds.size, 4):
        a, b, c, d = bounds[k], bounds[k + 1], bounds[k + 2], bounds[k + 3]
        v1, v2, v3, v4 = values[k + 1], values[k + 2], values[k + 3], values[k + 4]
        for i in range(x.size):
            s = x[i] * alpha
            v = v1 if s > a else y[i]
            v = v2 if s > b else v
            v = v3 if s > c else v
            y[i] = v4 if s > d else v


@helper
def count_and_select(x: Array, alpha: Number, bounds: Array, values: Array, counts: Array, y: Array) -> None:
    """Sets `counts[i]` to the number of bounds below `alpha * x[i]`, and `y` as in `select`.

    Eight bounds at a time, whose values stay in registers; `bounds` is padded to fours.
    """
    first = values[0]
    for i in range(x.size):
        s = x[i] * alpha
        y[i] = first if s == s else s
        counts[i] = 0
    eights = bounds.size // 8 * 8
    for k in range(0, eights, 8):
        _pass_eight(x, alpha, bounds[k : k + 8], values[k + 1 : k + 9], np.int32(k), counts, y)
    if eights < bounds.size:
        _pass_four(x, alpha, bounds[eights:], values[eights + 1 :], np.int32(eights), counts, y)


@helper
def _pass_four(
    x: Array, alpha: Number, bounds: Array, values: Array, before: np.int32, counts: Array, y: Array
) -> None:
    a, b, c, d = bounds[0], bounds[1], bounds[2], bounds[3]
    v1, v2, v3, v4 = values[0], values[1], values[2], values[3]
    n1, n2, n3, n4 = np.int32(before + 1), np.int32(before + 2), np.int32(before + 3), np.int32(before + 4)
    for i in range(x.size):
        s = x[i] * alpha
        v, n = (v1, n1) if s > a else (y[i], counts[i])
        v, n = (v2, n2) if s > b else (v, n)
        v, n = (v3, n3) if s > c else (v, n)
        y[i], counts[i] = (v4, n4) if s > d else (v, n)


@helper
def _pass_eight(
    x: Array, alpha: Number, bounds: Array, values: Array, before: np.int32, counts: Array, y: Array
) -> None:
    a, b, c, d, e, f, g, h = (
        bounds[0], bounds[1], bounds[2], bounds[3], bounds[4], bounds[5], bounds[6], bounds[7]
    )  # fmt: skip
    v1, v2, v3, v4, v5, v6, v7, v8 = (
        values[0], values[1], values[2], values[3], values[4], values[5], values[6], values[7]
    )  # fmt: skip
    n1, n2, n3, n4 = np.int32(before + 1), np.int32(before + 2), np.int32(before + 3), np.int32(before + 4)
    n5, n6, n7, n8 = np.int32(before + 5), np.int32(before + 6), np.int32(before + 7), np.int32(before + 8)
    for i in range(x.size):
        s = x[i] * alpha
        v, n = (v1, n1) if s > a else (y[i], counts[i])
        v, n = (v2, n2) if s > b else (v, n)
        v, n = (v3, n3) if s > c else (v, n)
        v, n = (v4, n4) if s > d else (v, n)
        v, n = (v5, n5) if s > e else (v, n)
        v, n = (v6, n6) if s > f else (v, n)
        v, n = (v7, n7) if s > g else (v, n)
        y[i], counts[i] = (v8, n8) if s > h else (v, n)


@helper
def _cell(s: Number, origin: Number, per_unit: Number, last: Number) -> np.int32:
    """Returns the cell of `s`, which never decreases with `s`: bounds in earlier cells are below `s`."""
    cell = (s - origin) * per_unit
    cell = cell if cell > 0 else 0 * origin
    return np.int32(cell if cell < last else last)


@compiled
def fill_grid(bounds: Array, origin: Number, per_unit: Number, cells: Array) -> int:
    """Sets `cells[c]` to the number of bounds in cells before `c`; returns the most bounds in one cell."""
    last = bounds.dtype.type(cells.size - 1)
    cells[:] = 0
    for k in range(bounds.size):
        cells[_cell(bounds[k], origin, per_unit, last)] += 1
    before, most = 0, 0
    for c in range(cells.size):
        inside = cells[c]
        cells[c] = before
        before += inside
        most = max(most, inside)
    return most


@helper
def search(
    x: Array,
    alpha: Number,
    bounds: Array,
    origin: Number,
    per_unit: Number,
    cells: Array,
    most: int,
    counts: Array,
) -> None:
    """Sets the counts of `count_and_select` by the grid: earlier cells' bounds, then those of the own."""
    last = x.dtype.type(cells.size - 1)
    for i in range(x.size):
        counts[i] = cells[_cell(x[i] * alpha, origin, per_unit, last)]
    for _ in range(most):
        for i in range(x.size):
            counts[i] += np.int32(x[i] * alpha > bounds[counts[i]])


@helper
def locate(
    x: Array, alpha: Number, bounds: Array, values: Array, grid: Grid, counts: Array, y: Array
) -> None:
    """Runs `count_and_select`, by the grid where there is one."""
    origin, per_unit, cells, most = grid
    if cells.size == 0:
        count_and_select(x, alpha, bounds, values, counts, y)
        return
    search(x, alpha, bounds, origin, per_unit, cells, most, counts)
    for i in range(x.size):
        s = x[i] * alpha
        y[i] = values[counts[i]] if s == s else s


@helper
def ramp_values(x: Array, alpha: Number, ramps: Ramps, spare: Array, y: Array) -> None:
    """Sets `y` to `reference.ramp_staircase`: it counts finished ramps, `spare` holds the open one."""
    begins, slopes, step = ramps
    one, zero = x.dtype.type(1), x.dtype.type(0)
    for i in range(x.size):
        y[i], spare[i] = zero, zero
    for k in range(begins.size):
        begin, slope = begins[k], slopes[k]
        for i in range(x.size):
            ramp = (x[i] * alpha - begin) * slope
            y[i] += one if ramp >= one else zero
            spare[i] = ramp if (ramp > zero) & (ramp < one) else spare[i]
    for i in range(x.size):
        s = x[i] * alpha
        y[i] = (y[i] + spare[i]) * step if s == s else s


@helper
def mark_nans(x: Array, alpha: Number, nan_bin: int, counts: Array) -> int:
    """Moves NaN inputs to their own bin and returns their number."""
    nans = 0
    for i in range(x.size):
        s = x[i] * alpha
        nans += 1 if s != s else 0
    if nans:
        for i in range(x.size):
            s = x[i] * alpha
            counts[i] = counts[i] if s == s else nan_bin
    return nans


@helper
def add_to_bins(grad: Array, x: Array, counts: Array, bins: Array) -> None:
    """Adds `g` and `g x` to the bin of every element, lane by lane: `bins` is `[LANES, 2 * bins]`.

    Places are unsigned: a signed one would be looked at for being counted from the end.
    """
    full = x.size // LANES * LANES
    for i in range(0, full, LANES):
        for lane in range(LANES):
            place = np.uint64(2) * np.uint64(np.uint32(counts[i + lane]))
            g = np.float64(grad[i + lane])
            bins[lane, place] += g
            bins[lane, place + np.uint64(1)] += g * np.float64(x[i + lane])
    for i in range(full, x.size):
        g = np.float64(grad[i])
        bins[0, 2 * counts[i]] += g
        bins[0, 2 * counts[i] + 1] += g * np.float64(x[i])


@helper
def add_lanes(bins: Array, sums: Array) -> None:
    """Adds the lanes' histograms in fixed order."""
    for row in range(bins.shape[1] // 2):
        for column in range(2):
            total = 0.0
            for lane in range(LANES):
                total += bins[lane, 2 * row + column]
            sums[row, column] = total


@compiled
def staircase_chunks(
    first: int,
    last: int,
    size: int,
    x: Array,
    alpha: Number,
    bounds: Array,
    values: Array,
    grid: Grid,
    y: Array,
) -> None:
    """Runs chunks `first .. last - 1` of the forward pass."""
    counts = np.empty(BLOCK, np.int32)
    for begin in range(first * size, min(last * size, x.size), BLOCK):
        end = min(begin + BLOCK, x.size)
        if grid[2].size == 0:
            select(x[begin:end], alpha, bounds, values, y[begin:end])
        else:
            locate(x[begin:end], alpha, bounds, values, grid, counts[: end - begin], y[begin:end])


@compiled
def ramp_chunks(
    first: int, last: int, size: int, x: Array, alpha: Number, ramps: Ramps, beta: Number, y: Array
) -> None:
    """Runs chunks `first .. last - 1` of the forward pass with ramps."""
    spare = np.empty(BLOCK, x.dtype)
    for begin in range(first * size, min(last * size, x.size), BLOCK):
        end = min(begin + BLOCK, x.size)
        target = y[begin:end]
        ramp_values(x[begin:end], alpha, ramps, spare, target)
        for i in range(target.size):
            target[i] *= beta


@compiled
def gradient_chunks(
    first: int,
    last: int,
    size: int,
    grad: Array,
    x: Array,
    alpha: Number,
    bounds: Array,
    gains: Array,
    grid: Grid,
    ramps: Ramps,
    ramped: bool,
    dx: Array,
    sums: Array,
) -> None:
    """Runs chunks `first .. last - 1` of the backward pass; `numba.threshold` describes `sums[chunk]`."""
    rows = sums.shape[1]
    counts = np.empty(BLOCK, np.int32)
    value, spare = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
    bins = np.empty((LANES, 2 * (rows - 1)))
    for chunk in range(first, last):
        bins[:] = 0.0
        nans, dot = 0, 0.0
        for begin in range(chunk * size, min((chunk + 1) * size, x.size), BLOCK):
            end = min(begin + BLOCK, x.size)
            g, v, d, c = grad[begin:end], x[begin:end], dx[begin:end], counts[: end - begin]
            locate(v, alpha, bounds, gains, grid, c, d)
            for i in range(d.size):
                d[i] *= g[i]
            nans += mark_nans(v, alpha, rows - 2, c)
            add_to_bins(g, v, c, bins)
            if ramped:
                ramp_values(v, alpha, ramps, spare, value)
                for i in range(v.size):
                    dot += np.float64(g[i]) * np.float64(value[i])
        add_lanes(bins, sums[chunk])
        sums[chunk, rows - 1, 0], sums[chunk, rows - 1, 1] = dot, nans
