"""The stem (norm, ReLU, pooling) in plain torch: the reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_n2uq.ops.backends.common.plane_operators import PlanePool
from lightning_n2uq.ops.backends.common.planes import PlaneNorm, empty_map
from lightning_n2uq.ops.backends.common.rows import is_rows
from lightning_n2uq.ops.backends.reference.fused_activation import (
    activation_gradient,
    chain,
    norm_gradient,
    statistics,
)
from lightning_n2uq.ops.formats.fused_activation import Window

__all__ = ["backward", "empty_map", "forward"]


def value(x: Tensor, norm: PlaneNorm, size: list[int], window: Window) -> tuple[Tensor, Tensor]:
    """Returns `relu(norm(x))` `[N, C, H, W]`, pooled to `size`, and each maximum's position, uint8."""
    kernel, stride, padding = window
    order, dtype, x = torch.channels_last if is_rows(x) else torch.contiguous_format, x.dtype, x.float()
    z = F.relu(chain(x.flatten(2), norm, None)[0]).reshape(x.shape)
    y, index = F.max_pool2d(z, kernel, stride, padding, return_indices=True)
    row = index // x.shape[3] - torch.arange(size[0], device=x.device)[:, None] * stride + padding
    column = index % x.shape[3] - torch.arange(size[1], device=x.device) * stride + padding
    taps = (row * kernel + column).to(torch.uint8)
    return y.to(dtype).contiguous(memory_format=order), taps.contiguous(memory_format=order)


def gradient(grad: Tensor, taps: Tensor, x: Tensor, norm: PlaneNorm, window: Window) -> tuple[Tensor, Tensor]:
    """Returns the gradient of `x` and the sums `[C, 4]` of `reference.fused_activation.gradient`."""
    kernel, stride, padding = window
    rows, columns = grad.shape[2:]
    row = torch.arange(rows, device=x.device)[:, None] * stride - padding + taps.long() // kernel
    column = torch.arange(columns, device=x.device) * stride - padding + taps.long() % kernel
    index = (row * x.shape[3] + column).flatten(2)
    source, grad = x.float().flatten(2), grad.float()
    d = torch.zeros_like(source).scatter_add_(2, index, grad.flatten(2))
    u, _ = chain(source, norm, None)
    d, sums = activation_gradient(torch.where(u <= 0, torch.zeros_like(d), d), u, source, norm, None)
    dx = empty_map(x, x.dtype).copy_(norm_gradient(d, source, norm, sums).reshape(x.shape))
    return dx, sums


_PLANES = PlanePool(statistics, value, gradient)
forward, backward = _PLANES.forward, _PLANES.backward
