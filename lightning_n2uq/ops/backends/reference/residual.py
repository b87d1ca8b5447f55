"""Oracle of a residual block's end (norms, sum, bias, PReLU, bias)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_n2uq.ops.backends.reference.fused_activation import (
    activation_gradient,
    chain,
    norm_gradient,
    statistics,
)
from lightning_n2uq.ops.formats.fused_activation import Activation, Norm

__all__ = ["residual", "residual_gradient", "statistics"]


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
    """Gradients of `x` and `other` `[N, C, P]`, and for each the sums of `fused_activation.backward`."""
    u = _branch_sum(x, norm, other, other_norm, act)
    d, sums = activation_gradient(grad, u, x, norm, act)
    other_sums = torch.zeros_like(sums)
    other_sums[:, 0] = sums[:, 0]
    dother = d
    if other_norm is not None:
        other_sums[:, 3] = activation_gradient(d, u, other, other_norm, None)[1][:, 3]
        dother = norm_gradient(d, other, other_norm, other_sums)
    return norm_gradient(d, x, norm, sums), dother.clone(), sums, other_sums
