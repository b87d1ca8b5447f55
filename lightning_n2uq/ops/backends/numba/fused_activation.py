"""CPU kernels (numba) of the fused chain and of its codes (`fused_activation_loops`, `code_loops`).

The same interface as `reference.fused_activation`, which judges them: equal bit for bit but for sums, whose
float64 additions come in another order. Inputs are float32; other dtypes are cast by the caller.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.ops.backends.common.jit import Array, array, run_chunks
from lightning_n2uq.ops.backends.numba.code_loops import rebuild_channels
from lightning_n2uq.ops.backends.numba.fused_activation_loops import (
    backward_channels,
    forward_channels,
    statistics_channels,
)
from lightning_n2uq.ops.backends.numba.threshold import segment_sums, staircase, surrogate
from lightning_n2uq.ops.formats.fused_activation import Activation, Norm, packed_bytes
from lightning_n2uq.ops.tables import ThresholdTables

SMALLEST = 32768  # elements per thread below which waking a thread costs more than it saves
COUNTED = (
    4096  # elements that should share a histogram, whose clearing and adding up costs as much as hundreds
)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of `[N, C, P]`, `[C]` float64."""
    stats = np.empty((2, x.shape[1]))
    run_chunks(statistics_channels, x.shape[1], smallest(x), array(x), stats)
    return torch.from_numpy(stats[0]), torch.from_numpy(stats[1])


def forward(
    x: Tensor, norm: Norm | None, act: Activation | None, tables: ThresholdTables
) -> tuple[Tensor, Tensor]:
    """Quantized chain and packed codes of `[N, C, P]` float32."""
    batch, channels, pixels = x.shape
    bits = tables.thresholds.numel().bit_length()
    y = torch.empty_like(x)
    packed = torch.empty(batch, channels, packed_bytes(pixels, bits), dtype=torch.uint8)
    bounds, values, _ = staircase(array(tables.thresholds), array(tables.outputs))
    run_chunks(
        forward_channels,
        channels,
        smallest(x),
        array(x),
        norm_table(norm, channels),
        act_table(act, channels),
        array(tables.scale_in)[()],
        bounds,
        values,
        bits,
        array(y),
        array(packed),
    )
    return y, packed


def rebuild(packed: Tensor, outputs: Tensor, pixels: int) -> Tensor:
    """The quantized chain `[N, C, P]` float32 from its packed codes; `outputs` is the table `[n + 1]`."""
    y = torch.empty(*packed.shape[:2], pixels)
    bits = (outputs.numel() - 1).bit_length()
    run_chunks(rebuild_channels, y.shape[1], smallest(y), array(packed), array(outputs), bits, array(y))
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    norm: Norm | None,
    act: Activation | None,
    tables: ThresholdTables,
    scale_out: Tensor,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Input gradient `[N, C, P]`, sums `[C, 4]`, and the quantizer's segment sums; all `[N, C, P]` float32.

    The columns of the sums: gradients of the first bias (which is the norm's shift's), of the slope, of the
    second bias, and `sum d (x - mean)`.
    """
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
    """Fewest channels worth a thread of their own."""
    return max(1, SMALLEST * x.shape[1] // max(1, x.numel()))


def norm_table(norm: Norm | None, channels: int) -> Array:
    """`[C, 2]` scale and shift, or no columns."""
    if norm is None:
        return np.empty((channels, 0), np.float32)
    return array(torch.stack([norm.scale, norm.shift], 1))


def moments_table(norm: Norm | None, channels: int) -> Array:
    """`[C, 3]` mean, 1 / deviation, scale; zeros without a norm."""
    if norm is None:
        return np.zeros((channels, 3), np.float32)
    return array(torch.stack([norm.mean, norm.inverse, norm.scale], 1))


def act_table(act: Activation | None, channels: int) -> Array:
    """`[C, 3]` bias, slope, bias, or no columns."""
    if act is None:
        return np.empty((channels, 0), np.float32)
    return array(torch.stack([value.float() for value in act], 1))
