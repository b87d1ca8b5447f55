"""CPU kernels (numba) of the activation quantizer: one pass forward, one pass backward.

Equal bit for bit to `reference.threshold_quantize` and `reference.threshold_input_gradient`; the sums agree
with `reference.threshold_segment_sums` up to the order of their float64 additions.

The backward pass walks the merged bounds `t_0, T_1, t_1, .., T_n, t_n`: the number `j` of bounds below an
input gives both its segment `(j + 1) // 2` and its code `j // 2`, and one float64 histogram over `j` holds
everything that the parameter gradients need. NaN inputs have a bin of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.ops.backends.common.jit import Array, array, padded, run_chunks
from lightning_n2uq.ops.backends.numba.threshold_loops import (
    BLOCK,
    Grid,
    Ramps,
    fill_grid,
    gradient_chunks,
    ramp_chunks,
    staircase_chunks,
)
from lightning_n2uq.ops.layout import flat, flat_like
from lightning_n2uq.ops.tables import (
    QuantizerParameters,
    ThresholdTables,
    compute_dtype,
    operator_tables,
    output_step,
    parameter_gradients,
)

CHUNK = 32 * BLOCK  # elements per unit of parallel work
SMALLEST = 4  # chunks per thread below which waking a thread costs more than it saves
MAX_CHUNKS = 4096  # bounds the memory of the per-chunk histograms
GRID_FROM = 136  # number of bounds from which the grid beats comparing with every one


def forward(x: Tensor, quantizer: QuantizerParameters, ramp: float) -> Tensor:
    """Returns the quantized `x`; see `reference.threshold.forward`."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    dtype = compute_dtype(x.dtype)
    tables = operator_tables(quantizer, dtype, ramp)
    run = flat_like(x, y)
    source, target = array(run.to(dtype)), y if y.dtype == dtype else torch.empty_like(y, dtype=dtype)
    chunks, size = chunking(x.numel())
    alpha, out = array(tables.scale_in)[()], array(flat(target))
    if ramp > 0:
        beta = scalar(quantizer.scale_out, dtype)
        run_chunks(ramp_chunks, chunks, SMALLEST, size, source, alpha, ramps(tables), beta, out)
    else:
        steps = staircase(array(tables.thresholds), array(tables.outputs))
        run_chunks(staircase_chunks, chunks, SMALLEST, size, source, alpha, *steps, out)
    return y if target is y else y.copy_(target)


def backward(
    grad: Tensor, x: Tensor, quantizer: QuantizerParameters, ramp: float
) -> tuple[Tensor, QuantizerParameters]:
    """Returns the gradients of `x` and of the parameters; see `reference.threshold.backward`."""
    dtype = compute_dtype(x.dtype)
    tables = operator_tables(quantizer, dtype, ramp)
    dx = torch.empty_like(x)
    target = dx if dx.dtype == dtype else torch.empty_like(dx, dtype=dtype)
    chunks, size = chunking(x.numel())
    bins = np.empty((chunks, 2 * tables.thresholds.numel() + 4, 2))
    if chunks > 0:
        run_chunks(
            gradient_chunks,
            chunks,
            SMALLEST,
            size,
            array(flat_like(grad, dx).to(dtype)),
            array(flat_like(x, dx).to(dtype)),
            array(tables.scale_in)[()],
            *surrogate(tables, quantizer.scale_out),
            ramps(tables),
            ramp > 0,
            array(flat(target)),
            bins,
        )
    if target is not dx:
        dx.copy_(target)
    sums, value_sum = segment_sums(bins.sum(0), tables, ramp > 0)
    return dx, parameter_gradients(sums, value_sum, quantizer)


def chunking(numel: int) -> tuple[int, int]:
    """Returns number and size of the chunks: they depend on `numel` alone, so that threads change no bit."""
    size = max(CHUNK, -(-numel // (MAX_CHUNKS * BLOCK)) * BLOCK)
    return -(-numel // size), size


def segment_sums(bins: Array, tables: ThresholdTables, ramped: bool) -> tuple[Tensor, Tensor]:
    """Returns `reference.threshold_segment_sums` from sums by number of bounds, `[2 n + 4, 2]`.

    Rows `0 .. 2 n + 1` hold `sum g` and `sum g x`, row `2 n + 2` those of NaN inputs, the last row the sum
    of `g` times the ramp's value, and the number of NaN inputs.
    """
    n = tables.thresholds.numel()
    sums = np.zeros((n + 2, 2))
    sums[1:-1] = bins[1 : 2 * n : 2] + bins[2 : 2 * n + 1 : 2]
    sums[n] += bins[2 * n + 2]
    sums[0, 0], sums[n + 1, 0] = bins[0, 0], bins[2 * n + 1, 0]
    levels = array(tables.levels).astype(np.float64).repeat(2)
    value = bins[-1, 0] if ramped else (bins[: 2 * n + 2, 0] * levels).sum()
    if bins[-1, 1] > 0:
        value = np.nan
    return torch.from_numpy(sums), torch.tensor(value, dtype=torch.float64)


def surrogate(tables: ThresholdTables, scale_out: Tensor) -> tuple[Array, Array, Grid]:
    """Returns merged bounds, the output's slope by number of bounds below an input, and their grid."""
    knots, thresholds, slopes = array(tables.knots), array(tables.thresholds), array(tables.slopes)
    bounds = np.empty(knots.size + thresholds.size, knots.dtype)
    bounds[::2], bounds[1::2] = knots, thresholds
    gain = array(tables.scale_in) * scalar(scale_out, tables.slopes.dtype)
    return staircase(bounds, (slopes * gain)[(np.arange(bounds.size + 1) + 1) // 2])


def staircase(bounds: Array, values: Array) -> tuple[Array, Array, Grid]:
    """Returns bounds and values as the loops want them (bounds padded with infinity), and a grid."""
    values = np.concatenate([values[:1], padded(values[1:], 4, 0.0)])
    return padded(bounds, 4, np.inf), values, _grid(bounds)


def ramps(tables: ThresholdTables) -> Ramps:
    """Returns where the ramps begin, their slopes, the output step."""
    begins = array(tables.ramp_starts)
    return begins, array(tables.ramp_slopes), begins.dtype.type(output_step(begins.size))


def scalar(x: Tensor, dtype: torch.dtype) -> Any:  # noqa: ANN401 -- a numpy number of that dtype
    """Returns the number that a one-element tensor holds."""
    return array(x.to(dtype)).reshape(-1)[0]


def _grid(bounds: Array) -> Grid:
    """Returns origin, cells per unit, cells, most bounds per cell; no cells where comparing is as good.

    `bounds` must not be a multiple of four: stepping past the last one reads the infinity behind it.
    """
    number = bounds.dtype.type
    none = number(0), number(0), np.empty(0, np.int32), 0
    if bounds.size < GRID_FROM or bounds.size % 4 == 0:
        return none
    with np.errstate(all="ignore"):
        per_unit = number(4 * bounds.size) / (bounds[-1] - bounds[0])
    if not np.isfinite([*bounds, per_unit]).all():
        return none
    cells = np.empty(4 * bounds.size, np.int32)
    most = fill_grid(bounds, bounds[0], per_unit, cells)
    return bounds[0], per_unit, cells, int(most)
