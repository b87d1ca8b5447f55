"""What the loops need of every channel, as float32 tables `[C, columns]`; no columns means no such step."""

from __future__ import annotations

import numpy as np
import torch

from lightning_n2uq.ops.backends.common.jit import Array, array
from lightning_n2uq.ops.backends.common.planes import PlaneNorm
from lightning_n2uq.ops.formats.fused_activation import PReLUParameters


def norm_table(norm: PlaneNorm | None, channels: int) -> Array:
    """Returns `[C, 2]` scale and shift, or no columns."""
    if norm is None:
        return np.empty((channels, 0), np.float32)
    return array(torch.stack([norm.scale, norm.shift], 1))


def moments_table(norm: PlaneNorm | None, channels: int) -> Array:
    """Returns `[C, 3]` mean, 1 / deviation, scale; zeros without a norm."""
    if norm is None:
        return np.zeros((channels, 3), np.float32)
    return array(torch.stack([norm.mean, norm.inverse, norm.scale], 1))


def act_table(act: PReLUParameters | None, channels: int) -> Array:
    """Returns `[C, 3]` bias, slope, bias, or no columns."""
    if act is None:
        return np.empty((channels, 0), np.float32)
    return array(torch.stack([value.float() for value in act], 1))
