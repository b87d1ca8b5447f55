"""Integer convolution and linear layer in plain torch: the reference, exact on every device.

Rules that must not be tidied: the sum is exact (float64 holds integers up to 2^53), it is rounded to float32
once, and then multiplied by the float32 scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_n2uq.ops.formats.integer import IntegerRange, Prepared


def obstacle(size: IntegerRange) -> str | None:
    """Returns None: no sum of bytes leaves float64's integers."""
    return None


def prepare_conv2d(
    levels: Tensor, scale: Tensor, geometry: tuple[Sequence[int], ...], groups: int
) -> Prepared:
    """Returns levels and scale.

    Args:
        levels: `[C_out, C_in / groups, kH, kW]` int8.
        scale: `[C_out]` float32.
        geometry: Stride, padding, dilation.
        groups: The number of groups.
    """
    return Prepared(levels, scale)


def conv2d(
    codes: Tensor, weight: Prepared, geometry: tuple[Sequence[int], ...], groups: int, dtype: torch.dtype
) -> Tensor:
    """Returns `scale` times the convolution of codes and levels, float32.

    Args:
        codes: `[N, C_in, H, W]` uint8.
        weight: What `prepare_conv2d` has returned.
        geometry: Stride, padding, dilation.
        groups: The number of groups.
        dtype: What the caller wants; a backend may leave float32.
    """
    stride, padding, dilation = geometry
    sums = F.conv2d(codes.double(), weight.packed.double(), None, stride, padding, dilation, groups)
    return sums.float() * weight.scale[:, None, None]


def prepare_linear(levels: Tensor, scale: Tensor) -> Prepared:
    """Returns levels and scale."""
    return Prepared(levels, scale)


def linear(codes: Tensor, weight: Prepared, dtype: torch.dtype) -> Tensor:
    """Returns `scale` times the product of codes `[rows, in]` and levels, `[rows, out]` float32."""
    return F.linear(codes.double(), weight.packed.double()).float() * weight.scale
