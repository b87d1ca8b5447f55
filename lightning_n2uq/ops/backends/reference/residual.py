"""The end of a residual block (norms, sum, bias, PReLU, bias) in plain torch: the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_n2uq.ops.backends.common.plane_operators import PlaneResidual
from lightning_n2uq.ops.backends.common.planes import PlaneNorm, empty_map
from lightning_n2uq.ops.backends.reference.fused_activation import (
    activation_gradient,
    as_planes,
    chain,
    in_form_of,
    norm_gradient,
    statistics,
)
from lightning_n2uq.ops.formats.fused_activation import PReLUParameters

__all__ = ["backward", "empty_map", "forward"]


def _branch_sum(
    x: Tensor, norm: PlaneNorm, other: Tensor, other_norm: PlaneNorm | None, act: PReLUParameters
) -> Tensor:
    """Returns what PReLU sees."""
    total = chain(x, norm, None)[0] + chain(other, other_norm, None)[0]
    return total + act.bias_in.detach().to(x.dtype)[:, None]


def value(
    x: Tensor, norm: PlaneNorm, other: Tensor, other_norm: PlaneNorm | None, act: PReLUParameters
) -> Tensor:
    """Returns `prelu(norm(x) + other_norm(other) + bias) + bias` of planes or rows."""
    u = _branch_sum(as_planes(x), norm, as_planes(other), other_norm, act)
    slope, bias_out = act.slope.detach().to(u.dtype)[:, None], act.bias_out.detach().to(u.dtype)[:, None]
    return in_form_of(torch.where(u > 0, u, slope * u) + bias_out, x, x.dtype)


def gradient(
    grad: Tensor,
    x: Tensor,
    norm: PlaneNorm,
    other: Tensor,
    other_norm: PlaneNorm | None,
    act: PReLUParameters,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns both inputs' gradients, and for each the sums of `fused_activation.gradient`."""
    source, branch = as_planes(x), as_planes(other)
    u = _branch_sum(source, norm, branch, other_norm, act)
    d, sums = activation_gradient(as_planes(grad), u, source, norm, act)
    other_sums = torch.zeros_like(sums)
    other_sums[:, 0] = sums[:, 0]
    dother = d
    if other_norm is not None:
        other_sums[:, 3] = activation_gradient(d, u, branch, other_norm, None)[1][:, 3]
        dother = norm_gradient(d, branch, other_norm, other_sums)
    dx = norm_gradient(d, source, norm, sums)
    return in_form_of(dx, x, x.dtype), in_form_of(dother.clone(), other, other.dtype), sums, other_sums


_PLANES = PlaneResidual(statistics, value, gradient)
forward, backward = _PLANES.forward, _PLANES.backward
