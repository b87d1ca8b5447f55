"""CPU kernels (numba) of the fused chain and of its codes (`fused_activation_loops`, `code_loops`).

The same interface as `reference.fused_activation`, which judges them: equal bit for bit but for sums, whose
float64 additions come in another order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.ops.backends.common.jit import array, run_chunks
from lightning_n2uq.ops.backends.common.plane_operators import PlaneActivation
from lightning_n2uq.ops.backends.common.planes import (
    PlaneNorm,
    codes_for_backward,
    empty_map,
    empty_rebuilt,
    has_nan,
    ordered,
    packed_shape,
)
from lightning_n2uq.ops.backends.numba import fused_activation_rows
from lightning_n2uq.ops.backends.numba.channel_tables import act_table, moments_table, norm_table
from lightning_n2uq.ops.backends.numba.code_loops import rebuild_channels
from lightning_n2uq.ops.backends.numba.code_map_loops import code_channels
from lightning_n2uq.ops.backends.numba.fused_activation_loops import (
    backward_channels,
    forward_channels,
    statistics_channels,
)
from lightning_n2uq.ops.backends.numba.threshold import segment_sums, staircase, surrogate
from lightning_n2uq.ops.formats.fused_activation import PReLUParameters
from lightning_n2uq.ops.tables import ThresholdTables

__all__ = [
    "backward",
    "codes_for_backward",
    "empty_map",
    "empty_rebuilt",
    "forward",
    "has_nan",
    "ordered",
    "packed_shape",
    "rebuild",
]

MOST_BITS = 8  # of a quantizer on the fused path
SMALLEST = 32768  # elements per thread below which waking a thread costs more than it saves
COUNTED = 4096  # elements to share a histogram, whose clearing and adding up costs as much as hundreds


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and biased variance of every channel of planes or rows, `[C]` float64."""
    if x.dim() == 2:
        return fused_activation_rows.statistics(x)
    stats = np.empty((2, x.shape[1]))
    run_chunks(statistics_channels, x.shape[1], smallest(x), array(x), stats)
    return torch.from_numpy(stats[0]), torch.from_numpy(stats[1])


def quantize(
    x: Tensor,
    norm: PlaneNorm | None,
    act: PReLUParameters | None,
    tables: ThresholdTables,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns the quantized chain in `dtype` (uint8: its codes; float32 of planes), packed codes."""
    if x.dim() == 2:
        return fused_activation_rows.quantize(x, norm, act, tables, dtype)
    channels = x.shape[1]
    bits = tables.thresholds.numel().bit_length()
    y = torch.empty_like(x, dtype=dtype)
    packed = torch.empty(packed_shape(x, bits), dtype=torch.uint8)
    bounds, values, _ = staircase(array(tables.thresholds), array(tables.outputs))
    chain = array(x), norm_table(norm, channels), act_table(act, channels), array(tables.scale_in)[()], bounds
    targets = bits, array(y), array(packed)
    if dtype == torch.uint8:
        run_chunks(code_channels, channels, smallest(x), *chain, *targets)
    else:
        run_chunks(forward_channels, channels, smallest(x), *chain, values, *targets)
    return y, packed


def unpack(packed: Tensor, outputs: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns the quantized chain of a map of that size; `outputs` is the table `[n + 1]`."""
    if packed.dim() == 2:
        return fused_activation_rows.unpack(packed, outputs, size, dtype)
    y = torch.empty(*packed.shape[:2], math.prod(size[2:]))
    bits = (outputs.numel() - 1).bit_length()
    run_chunks(rebuild_channels, y.shape[1], smallest(y), array(packed), array(outputs), bits, array(y))
    return y


def gradient(
    grad: Tensor,
    x: Tensor,
    norm: PlaneNorm | None,
    act: PReLUParameters | None,
    tables: ThresholdTables,
    scale_out: Tensor,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Returns the input gradient, sums `[C, 4]`, and the quantizer's segment sums.

    The columns of the sums: gradients of the first bias (which is the norm's shift's), of the slope, of the
    second bias, and `sum d (x - mean)`.
    """
    if x.dim() == 2:
        return fused_activation_rows.gradient(grad, x, norm, act, tables, scale_out)
    channels, n = x.shape[1], tables.thresholds.numel()
    group = max(1, COUNTED * channels // max(1, x.numel()))  # by the shape alone: the bits hang on it
    groups = -(-channels // group)
    dx = torch.empty_like(x)
    sums, bins = np.zeros((channels, 4)), np.empty((groups, 2 * n + 4, 2))
    run_chunks(
        backward_channels,
        groups,
        max(1, smallest(x) // group),
        group,
        array(grad),
        array(x),
        norm_table(norm, channels),
        moments_table(norm, channels),
        act_table(act, channels),
        array(tables.scale_in)[()],
        *surrogate(tables, scale_out),
        array(dx),
        bins,
        sums,
    )
    return dx, torch.from_numpy(sums), segment_sums(bins.sum(0), tables, ramped=False)


def smallest(x: Tensor) -> int:
    """Returns the fewest channels worth a thread of their own."""
    return max(1, SMALLEST * x.shape[1] // max(1, x.numel()))


_PLANES = PlaneActivation(statistics, quantize, gradient, unpack)
forward, backward, rebuild = _PLANES.forward, _PLANES.backward, _PLANES.rebuild
