"""Compiled loops of the fused pre-activation chain on channels-last maps (`row_loops`, `common.rows`).

A map is flat, `[N H W C]` float32 or bfloat16 bits. Work is split by units or by chunks of units, of which
each has sums of its own. Tables are float32 `[C, columns]` as in `fused_activation_loops`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from lightning_n2uq.ops.backends.common.jit import Array, Number, compiled, helper
from lightning_n2uq.ops.backends.common.rows import Units
from lightning_n2uq.ops.backends.numba.code_loops import look_up, narrow, pack, unpack
from lightning_n2uq.ops.backends.numba.code_map_loops import count
from lightning_n2uq.ops.backends.numba.fused_activation_loops import has_nan
from lightning_n2uq.ops.backends.numba.row_loops import (
    activate,
    activation_gradient,
    fold,
    input_sums,
    loaded,
    normalize,
    span,
    store,
    target,
    tiled,
)
from lightning_n2uq.ops.backends.numba.threshold_loops import (
    LANES,
    Grid,
    add_lanes,
    add_to_bins,
    count_and_select,
    locate,
    mark_nans,
)


def put(
    v: Array, alpha: Number, bounds: Array, values: Array, y: Array, begin: int, room: Array, counts: Array
) -> None:
    """Writes codes to `counts`, and what they stand for, or themselves where `y` is uint8, to `y`."""
    raise NotImplementedError  # compiled functions have `_put`


@overload(put, strict=False)
def _put(
    v: Any,  # noqa: ANN401  # types of numba
    alpha: Any,  # noqa: ANN401
    bounds: Any,  # noqa: ANN401
    values: Any,  # noqa: ANN401
    y: Any,  # noqa: ANN401
    begin: Any,  # noqa: ANN401
    room: Any,  # noqa: ANN401
    counts: Any,  # noqa: ANN401
) -> Callable[..., None]:
    def codes(
        v: Array,
        alpha: Number,
        bounds: Array,
        values: Array,
        y: Array,
        begin: int,
        room: Array,
        counts: Array,
    ) -> None:
        count(v, alpha, bounds, counts)
        narrow(counts, y[begin : begin + v.size])

    def floats(
        v: Array,
        alpha: Number,
        bounds: Array,
        values: Array,
        y: Array,
        begin: int,
        room: Array,
        counts: Array,
    ) -> None:
        result = target(y, begin, begin + v.size, room)
        count_and_select(v, alpha, bounds, values, counts, result)
        store(result, y, begin)

    return codes if y.dtype == types.uint8 else floats


@compiled
def forward_rows(
    first: int,
    last: int,
    form: Units,
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
    """Writes output `y` (uint8: codes, 0 for NaN) and packed codes of the units `first .. last - 1`."""
    xs, ys = np.empty(form.size, np.float32), np.empty(form.size, np.float32)
    u, v = np.empty(form.size, np.float32), np.empty(form.size, np.float32)
    counts, codes = np.empty(form.size, np.int32), np.zeros((form.size + 7) // 8 * 8, np.uint8)
    norms, acts, flag = tiled(norm, form), tiled(act, form), packed.shape[1] - 1
    for index in range(first, last):
        begin, end, place = span(index, form, x.size)
        size = end - begin
        normalize(loaded(x, begin, end, xs), norms, place, u[:size])
        activate(u[:size], acts, place, v[:size])
        put(v[:size], alpha, bounds, values, y, begin, ys, counts[:size])
        narrow(counts[:size], codes)
        codes[size:] = 0
        pack(codes, bits, packed[index])
        packed[index, flag] = has_nan(v[:size], alpha)


@compiled
def rebuild_rows(
    first: int, last: int, form: Units, packed: Array, values: Array, bits: int, y: Array
) -> None:
    """Writes `y` of the units `first .. last - 1` from the packed codes: the bits that forward gave."""
    codes, ys = np.empty((form.size + 7) // 8 * 8, np.uint8), np.empty(form.size, np.float32)
    flag = packed.shape[1] - 1
    for index in range(first, last):
        begin, end, _ = span(index, form, y.size)
        result = target(y, begin, end, ys)
        unpack(packed[index], bits, codes)
        look_up(codes, values, result)
        if packed[index, flag]:
            result[:] = np.nan
        store(result, y, begin)


@helper
def _backward_unit(
    g: Array,
    x: Array,
    norm: Array,
    mean: Array,
    act: Array,
    place: int,
    form: Units,
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
    """Writes the gradient `d` of the norm's output for one unit; adds to `lanes` and `sums`.

    Returns:
        The number of NaN inputs.
    """
    normalize(x, norm, place, u)
    activate(u, act, place, v)
    locate(v, alpha, bounds, gains, grid, counts, d)
    for i in range(d.size):
        d[i] *= g[i]
    nans = mark_nans(v, alpha, nan_bin, counts)
    add_to_bins(g, v, counts, lanes)
    activation_gradient(d, u, act, place, form, sums)
    if norm.shape[0] + act.shape[0] > 0:
        input_sums(d, x, mean, place, form, sums)
    return nans


@compiled
def backward_rows(
    first: int,
    last: int,
    size: int,
    form: Units,
    grad: Array,
    x: Array,
    norm: Array,
    moments: Array,
    act: Array,
    alpha: Number,
    bounds: Array,
    gains: Array,
    grid: Grid,
    d: Array,
    bins: Array,
    sums: Array,
) -> None:
    """Writes the gradient of the norm's output, histograms `[chunks, bins + 1, 2]`, sums `[chunks, 4, C]`.

    For the chunks `first .. last - 1`, `size` units each.
    """
    xs, gs, ds = (
        np.empty(form.size, np.float32),
        np.empty(form.size, np.float32),
        np.empty(form.size, np.float32),
    )
    u, v = np.empty(form.size, np.float32), np.empty(form.size, np.float32)
    counts, rows = np.empty(form.size, np.int32), bins.shape[1]
    lanes, acc = np.empty((LANES, 2 * (rows - 1))), np.empty((4, form.period))
    norms, acts, means = tiled(norm, form), tiled(act, form), tiled(moments, form)[0]
    for chunk in range(first, last):
        lanes[:], acc[:], nans = 0.0, 0.0, 0
        for index in range(chunk * size, (chunk + 1) * size):
            begin, end, place = span(index, form, x.size)
            k = end - begin
            if k <= 0:
                break
            result = target(d, begin, end, ds)
            nans += _backward_unit(
                loaded(grad, begin, end, gs),
                loaded(x, begin, end, xs),
                norms,
                means,
                acts,
                place,
                form,
                alpha,
                bounds,
                gains,
                grid,
                rows - 2,
                u[:k],
                v[:k],
                counts[:k],
                lanes,
                acc,
                result,
            )
            store(result, d, begin)
        fold(acc, sums[chunk])
        add_lanes(lanes, bins[chunk])
        bins[chunk, rows - 1, 0], bins[chunk, rows - 1, 1] = 0.0, nans
