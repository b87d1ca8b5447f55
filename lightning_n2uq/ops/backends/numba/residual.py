"""CPU kernels (numba) of a residual block's end (see `residual_loops`).

The same interface as `reference.residual`, which judges them: equal bit for bit but for sums, whose float64
additions come in another order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.ops.backends.common.jit import array, run_chunks
from lightning_n2uq.ops.backends.common.plane_operators import PlaneResidual
from lightning_n2uq.ops.backends.common.planes import PlaneNorm, empty_map
from lightning_n2uq.ops.backends.numba import residual_rows
from lightning_n2uq.ops.backends.numba.channel_tables import act_table, moments_table, norm_table
from lightning_n2uq.ops.backends.numba.fused_activation import smallest, statistics
from lightning_n2uq.ops.backends.numba.residual_loops import (
    residual_backward,
    residual_forward,
)
from lightning_n2uq.ops.formats.fused_activation import PReLUParameters

__all__ = ["backward", "empty_map", "forward"]


def value(
    x: Tensor, norm: PlaneNorm, other: Tensor, other_norm: PlaneNorm | None, act: PReLUParameters
) -> Tensor:
    """Returns `prelu(norm(x) + other_norm(other) + bias) + bias` of planes or rows."""
    if x.dim() == 2:
        return residual_rows.value(x, norm, other, other_norm, act)
    y, channels = torch.empty_like(x), x.shape[1]
    tables = (
        norm_table(norm, channels),
        array(other),
        norm_table(other_norm, channels),
        act_table(act, channels),
    )
    run_chunks(residual_forward, channels, smallest(x), array(x), *tables, array(y))
    return y


def gradient(
    grad: Tensor,
    x: Tensor,
    norm: PlaneNorm,
    other: Tensor,
    other_norm: PlaneNorm | None,
    act: PReLUParameters,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns both inputs' gradients, and for each the sums of `fused_activation.gradient`."""
    if x.dim() == 2:
        return residual_rows.gradient(grad, x, norm, other, other_norm, act)
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


_PLANES = PlaneResidual(statistics, value, gradient)
forward, backward = _PLANES.forward, _PLANES.backward
