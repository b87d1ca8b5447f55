"""Oracle of a residual block's end (norms, sum, bias, PReLU, bias) and of the stem (norm, ReLU, pooling)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_n2uq.ops.packed_format import Activation, Norm
from lightning_n2uq.ops.packed_reference import activation_gradient, chain, norm_gradient, statistics

__all__ = ["pool", "pool_gradient", "residual", "residual_gradient", "statistics"]


def _branch_sum(x: Tensor, norm: Norm, other: Tensor, other_norm: Norm | None, act: Activation) -> Tensor:
    """What PReLU sees."""
    total = chain(x, norm, None)[0] + chain(other, other_norm, None)[0]
    return total + act.bias_in.detach().to(x.dtype)[:, None]


def residual(x: Tensor, norm: Norm, other: Tensor, other_norm: Norm | None, act: Activation) -> Tensor:
    """`prelu(norm(x) + other_norm(other) + bias) + bias` of `[N, C, P]`."""
    u = _branch_sum(x, norm, other, other_norm, act)
    slope, bias_out = act.slope.detach().to(x.dtype)[:, None], act.bias_out.detach().to(x.dtype)[:, None]
    return torch.where(u > 0, u, slope * u) + bias_out


def residual_gradient(
    grad: Tensor, x: Tensor, norm: Norm, other: Tensor, other_norm: Norm | None, act: Activation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `x` and `other` `[N, C, P]`, and for each the sums of `packed_reference.backward`."""
    u = _branch_sum(x, norm, other, other_norm, act)
    d, sums = activation_gradient(grad, u, x, norm, act)
    other_sums = torch.zeros_like(sums)
    other_sums[:, 0] = sums[:, 0]
    dother = d
    if other_norm is not None:
        other_sums[:, 3] = activation_gradient(d, u, other, other_norm, None)[1][:, 3]
        dother = norm_gradient(d, other, other_norm, other_sums)
    return norm_gradient(d, x, norm, sums), dother.clone(), sums, other_sums


def pool(x: Tensor, norm: Norm, size: tuple[int, int], window: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Max pooling of `relu(norm(x))` `[N, C, H, W]` to `size`, and the position of each maximum, uint8."""
    kernel, stride, padding = window
    z = F.relu(chain(x.flatten(2), norm, None)[0]).reshape(x.shape)
    y, index = F.max_pool2d(z, kernel, stride, padding, return_indices=True)
    row = index // x.shape[3] - torch.arange(size[0], device=x.device)[:, None] * stride + padding
    column = index % x.shape[3] - torch.arange(size[1], device=x.device) * stride + padding
    return y, (row * kernel + column).to(torch.uint8)


def pool_gradient(
    grad: Tensor, taps: Tensor, x: Tensor, norm: Norm, window: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Gradient of `x` `[N, C, H, W]` and the sums `[C, 4]` of `packed_reference.backward`."""
    kernel, stride, padding = window
    rows, columns = grad.shape[2:]
    row = torch.arange(rows, device=x.device)[:, None] * stride - padding + taps.long() // kernel
    column = torch.arange(columns, device=x.device) * stride - padding + taps.long() % kernel
    index = (row * x.shape[3] + column).flatten(2)
    source = x.flatten(2)
    d = torch.zeros_like(source).scatter_add_(2, index, grad.flatten(2))
    u, _ = chain(source, norm, None)
    d, sums = activation_gradient(torch.where(u <= 0, torch.zeros_like(d), d), u, source, norm, None)
    return norm_gradient(d, source, norm, sums).reshape(x.shape), sums
