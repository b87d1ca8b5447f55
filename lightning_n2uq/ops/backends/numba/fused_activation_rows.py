"""CPU kernels (numba) of the fused chain on channels-last maps (`fused_activation_rows_loops`).

The kernels of `numba.fused_activation` for maps `[R, C]`, which are read and written in float32 or bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.ops.backends.common.jit import Array, array, run_chunks
from lightning_n2uq.ops.backends.common.planes import PlaneNorm
from lightning_n2uq.ops.backends.common.rows import Units, packed_shape, units
from lightning_n2uq.ops.backends.numba.channel_tables import act_table, moments_table, norm_table
from lightning_n2uq.ops.backends.numba.fused_activation_rows_loops import (
    backward_rows,
    forward_rows,
    rebuild_rows,
)
from lightning_n2uq.ops.backends.numba.row_loops import norm_gradient_rows, statistics_rows
from lightning_n2uq.ops.backends.numba.threshold import segment_sums, staircase, surrogate
from lightning_n2uq.ops.formats.fused_activation import PReLUParameters
from lightning_n2uq.ops.tables import ThresholdTables

SMALLEST = 32768  # values per thread below which waking a thread costs more than it saves


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and biased variance of every channel, `[C]` float64."""
    form = units(x.shape[1])
    chunks, size = form.chunks(x.numel())
    sums = np.empty((chunks, 2, x.shape[1]))
    run_chunks(statistics_rows, chunks, 1, size, form, flat(x), sums)
    with np.errstate(all="ignore"):  # NaN and infinity go their way
        mean, squares = sums.sum(0) / x.shape[0]
        variance = squares - mean * mean
    return torch.from_numpy(mean), torch.from_numpy(np.where(variance < 0, 0.0, variance))


def quantize(
    x: Tensor,
    norm: PlaneNorm | None,
    act: PReLUParameters | None,
    tables: ThresholdTables,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns the quantized chain `[R, C]` in `dtype`, and its packed codes."""
    channels, form = x.shape[1], units(x.shape[1])
    bits = tables.thresholds.numel().bit_length()
    y = torch.empty_like(x, dtype=dtype)
    packed = torch.empty(packed_shape(x.numel(), channels, bits), dtype=torch.uint8)
    bounds, values, _ = staircase(array(tables.thresholds), array(tables.outputs))
    run_chunks(
        forward_rows,
        len(packed),
        smallest(form),
        form,
        flat(x),
        norm_table(norm, channels),
        act_table(act, channels),
        array(tables.scale_in)[()],
        bounds,
        values,
        bits,
        flat(y),
        array(packed),
    )
    return y, packed


def unpack(packed: Tensor, outputs: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns the quantized chain `[R, C]` of a map of that size; `outputs` is the table `[n + 1]`."""
    y, form = torch.empty(math.prod(size) // size[1], size[1], dtype=dtype), units(size[1])
    bits = (outputs.numel() - 1).bit_length()
    run_chunks(rebuild_rows, len(packed), smallest(form), form, array(packed), array(outputs), bits, flat(y))
    return y


def gradient(
    grad: Tensor,
    x: Tensor,
    norm: PlaneNorm | None,
    act: PReLUParameters | None,
    tables: ThresholdTables,
    scale_out: Tensor,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Returns the input gradient `[R, C]`, sums `[C, 4]`, and the quantizer's segment sums."""
    channels, form, n = x.shape[1], units(x.shape[1]), tables.thresholds.numel()
    chunks, size = form.chunks(x.numel())
    dx = torch.empty_like(x)
    d = (
        dx if norm is None else dx if x.dtype == torch.float32 else torch.empty_like(x, dtype=torch.float32)
    )  # rounded once, behind the norm
    sums, bins = np.empty((chunks, 4, channels)), np.empty((chunks, 2 * n + 4, 2))
    run_chunks(
        backward_rows,
        chunks,
        1,
        size,
        form,
        flat(grad),
        flat(x),
        norm_table(norm, channels),
        moments_table(norm, channels),
        act_table(act, channels),
        array(tables.scale_in)[()],
        *surrogate(tables, scale_out),
        flat(d),
        bins,
        sums,
    )
    total = sums.sum(0)
    if norm is not None:
        norm_gradient(d, x, norm, total, dx)
    return dx, torch.from_numpy(total.T), segment_sums(bins.sum(0), tables, ramped=False)


def norm_gradient(d: Tensor, x: Tensor, norm: PlaneNorm, sums: Array, dx: Tensor) -> None:
    """Writes the gradient of a norm's input from `d`, that of its output, and sums `[4, C]`."""
    channels, form = x.shape[1], units(x.shape[1])
    fixes = corrections(sums, norm, x.shape[0])
    arrays = flat(d), flat(x), moments_table(norm, channels), fixes, flat(dx)
    run_chunks(norm_gradient_rows, form.number(x.numel()), smallest(form), form, *arrays)


def corrections(sums: Array, norm: PlaneNorm, number: int) -> Array:
    """Returns `[C, 2]` float32: what a norm's gradient takes off, and that times `x - mean`."""
    inverse = array(norm.inverse).astype(np.float64)
    with np.errstate(all="ignore"):
        return np.stack([sums[0] / number, sums[3] * inverse * inverse / number], 1).astype(np.float32)


def flat(x: Tensor) -> Array:
    """Returns rows as the flat array that the loops want."""
    return array(x).reshape(-1)


def smallest(form: Units) -> int:
    """Returns the fewest units worth a thread of their own."""
    return max(1, SMALLEST // form.size)
