"""CPU kernels (numba) of the stem (see `stem_loops`).

The same interface as `reference.stem`, which judges them: equal bit for bit but for sums, whose float64
additions come in another order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.ops.backends.common.jit import array, run_chunks
from lightning_n2uq.ops.backends.common.plane_operators import PlanePool
from lightning_n2uq.ops.backends.common.planes import PlaneNorm, empty_map
from lightning_n2uq.ops.backends.common.rows import is_rows
from lightning_n2uq.ops.backends.numba import stem_rows
from lightning_n2uq.ops.backends.numba.channel_tables import moments_table, norm_table
from lightning_n2uq.ops.backends.numba.fused_activation import smallest, statistics
from lightning_n2uq.ops.backends.numba.stem_loops import (
    stem_backward,
    stem_forward,
)
from lightning_n2uq.ops.formats.fused_activation import Window

__all__ = ["backward", "empty_map", "forward"]


def value(x: Tensor, norm: PlaneNorm, size: list[int], window: Window) -> tuple[Tensor, Tensor]:
    """Returns `relu(norm(x))` `[N, C, H, W]`, pooled to `size`, and each maximum's position, uint8."""
    if is_rows(x):
        return stem_rows.value(x, norm, size, window)
    shape, channels = (*x.shape[:2], *size), x.shape[1]
    y, taps = torch.empty(shape), torch.empty(shape, dtype=torch.uint8)
    table = norm_table(norm, channels)
    run_chunks(stem_forward, channels, smallest(x), array(x), table, *window, array(y), array(taps))
    return y, taps


def gradient(grad: Tensor, taps: Tensor, x: Tensor, norm: PlaneNorm, window: Window) -> tuple[Tensor, Tensor]:
    """Returns the gradient of `x` and the sums `[C, 4]` of `reference.fused_activation.gradient`."""
    if is_rows(x):
        return stem_rows.gradient(grad, taps, x, norm, window)
    channels = x.shape[1]
    dx, sums = torch.empty_like(x), np.zeros((channels, 4))
    tables = norm_table(norm, channels), moments_table(norm, channels)
    arrays = array(grad), array(taps), array(x)
    run_chunks(stem_backward, channels, smallest(x), *arrays, *tables, *window, array(dx), sums)
    return dx, torch.from_numpy(sums)


_PLANES = PlanePool(statistics, value, gradient)
forward, backward = _PLANES.forward, _PLANES.backward
