"""CPU kernels (numba) of the stem on channels-last maps `[N, C, H, W]` (`stem_rows_loops`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.ops.backends.common.jit import Array, array, run_chunks
from lightning_n2uq.ops.backends.common.planes import PlaneNorm, empty_map
from lightning_n2uq.ops.backends.numba.channel_tables import moments_table, norm_table
from lightning_n2uq.ops.backends.numba.fused_activation_rows import SMALLEST, corrections
from lightning_n2uq.ops.backends.numba.stem_rows_loops import (
    stem_backward_rows,
    stem_forward_rows,
    stem_sums_rows,
)
from lightning_n2uq.ops.formats.fused_activation import Window

_BAND = 8  # rows of an image's output that share the rows of its input between them
_MOST_CHUNKS = 64  # bounds the memory of the sums


def value(x: Tensor, norm: PlaneNorm, size: list[int], window: Window) -> tuple[Tensor, Tensor]:
    """Returns `relu(norm(x))`, pooled to `size`, and each maximum's position, uint8."""
    shape, channels = (*x.shape[:2], *size), x.shape[1]
    y, taps = empty_map(x, x.dtype, shape), empty_map(x, torch.uint8, shape)
    bands = x.shape[0] * -(-size[0] // _BAND)
    arrays = pixels(x), norm_table(norm, channels), *window, pixels(y), pixels(taps)
    run_chunks(stem_forward_rows, bands, 1, _BAND, *arrays)
    return y, taps


def gradient(grad: Tensor, taps: Tensor, x: Tensor, norm: PlaneNorm, window: Window) -> tuple[Tensor, Tensor]:
    """Returns the gradient of `x` and the sums `[C, 4]` of `reference.fused_activation.gradient`."""
    channels, rows = x.shape[1], x.shape[0] * x.shape[2]
    size = max(-(-SMALLEST // (x.shape[3] * channels)), -(-rows // _MOST_CHUNKS))
    chunks, dx = -(-rows // size), torch.empty_like(x)
    partial = np.empty((chunks, 4, channels))
    inputs = pixels(grad), pixels(taps), pixels(x), norm_table(norm, channels), moments_table(norm, channels)
    run_chunks(stem_sums_rows, chunks, 1, size, *inputs, *window, partial)
    sums = partial.sum(0)
    fixes = corrections(sums, norm, x.numel() // channels)
    run_chunks(stem_backward_rows, rows, size, *inputs, fixes, *window, pixels(dx))
    return dx, torch.from_numpy(sums.T)


def pixels(x: Tensor) -> Array:
    """Returns a channels-last map as the array `[N, H, W, C]`."""
    return array(x.permute(0, 2, 3, 1))
