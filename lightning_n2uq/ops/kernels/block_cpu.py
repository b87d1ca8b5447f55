"""CPU kernels (numba) of a residual block's end and of the stem (see `block_loops`).

The same interface as `block_reference`, which judges them: equal bit for bit but for sums, whose float64
additions come in another order. Inputs are float32.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.ops.kernels.block_loops import (
    residual_backward,
    residual_forward,
    stem_backward,
    stem_forward,
)
from lightning_n2uq.ops.kernels.jit import array, run_chunks
from lightning_n2uq.ops.kernels.packed_cpu import act_table, moments_table, norm_table, smallest, statistics
from lightning_n2uq.ops.packed_format import Activation, Norm

__all__ = ["pool", "pool_gradient", "residual", "residual_gradient", "statistics"]


def residual(x: Tensor, norm: Norm, other: Tensor, other_norm: Norm | None, act: Activation) -> Tensor:
    """`prelu(norm(x) + other_norm(other) + bias) + bias` of `[N, C, P]`."""
    y, channels = torch.empty_like(x), x.shape[1]
    tables = (
        norm_table(norm, channels),
        array(other),
        norm_table(other_norm, channels),
        act_table(act, channels),
    )
    run_chunks(residual_forward, channels, smallest(x), array(x), *tables, array(y))
    return y


def residual_gradient(
    grad: Tensor, x: Tensor, norm: Norm, other: Tensor, other_norm: Norm | None, act: Activation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `x` and `other` `[N, C, P]`, and for each the sums of `packed_reference.backward`."""
    channels = x.shape[1]
    dx, dother = torch.empty_like(x), torch.empty_like(x)
    sums, other_sums = np.zeros((channels, 4)), np.zeros((channels, 4))
    run_chunks(
        residual_backward,
        channels,
        smallest(x),
        array(grad),
        array(x),
        norm_table(norm, channels),
        moments_table(norm, channels),
        array(other),
        norm_table(other_norm, channels),
        moments_table(other_norm, channels),
        act_table(act, channels),
        array(dx),
        array(dother),
        sums,
        other_sums,
    )
    return dx, dother, torch.from_numpy(sums), torch.from_numpy(other_sums)


def pool(x: Tensor, norm: Norm, size: tuple[int, int], window: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Max pooling of `relu(norm(x))` `[N, C, H, W]` to `size`, and the position of each maximum, uint8."""
    shape, channels = (*x.shape[:2], *size), x.shape[1]
    y, taps = torch.empty(shape), torch.empty(shape, dtype=torch.uint8)
    table = norm_table(norm, channels)
    run_chunks(stem_forward, channels, smallest(x), array(x), table, *window, array(y), array(taps))
    return y, taps


def pool_gradient(
    grad: Tensor, taps: Tensor, x: Tensor, norm: Norm, window: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Gradient of `x` `[N, C, H, W]` and the sums `[C, 4]` of `packed_reference.backward`."""
    channels = x.shape[1]
    dx, sums = torch.empty_like(x), np.zeros((channels, 4))
    tables = norm_table(norm, channels), moments_table(norm, channels)
    arrays = array(grad), array(taps), array(x)
    run_chunks(stem_backward, channels, smallest(x), *arrays, *tables, *window, array(dx), sums)
    return dx, torch.from_numpy(sums)
