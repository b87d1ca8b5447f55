"""`residual_activation`: the end of a residual block as one operator that keeps no map of its own.

Its backward pass recomputes the sum from the convolution's output and the shortcut's, which other layers keep
anyway: batch norm the former, the block's first convolution the latter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_n2uq.ops.dispatch import load, select
from lightning_n2uq.ops.eager import differentiable, undispatched
from lightning_n2uq.ops.formats.fused_activation import (
    NormParameters,
    PReLUParameters,
    ResidualGradients,
    norm_parameters,
    present,
    restored,
)

OP = "residual_block"


def residual_activation(
    x: Tensor, norm: NormParameters, other: Tensor, other_norm: NormParameters | None, act: PReLUParameters
) -> tuple[Tensor, Tensor, Tensor]:
    """`prelu(norm(x) + other_norm(other) + bias) + bias`; batch norms use this batch; float32 throughout.

    Args:
        x: `[N, C, H, W]`, float16, bfloat16 or float32.
        norm: The parameters of the norm of `x`.
        other: The shortcut, shape of `x`.
        other_norm: The parameters of the shortcut's norm; None adds the shortcut as it is.
        act: PReLU's parameters.

    Returns:
        The sum's activation, dtype of `x`, in the backend's memory order (contiguous, channels-last by
        Triton); mean and biased variance of `x` and of `other`, `[2, C]` float32 each (the latter `[2, 0]`
        without a norm). Only the first has a gradient.
    """
    second = other_norm or (None, None, 0.0)
    y, stats, other_stats = _apply(x, *norm, other, *second, *act, select(OP, x.device))
    return y, stats, other_stats


@torch.library.custom_op("lightning_n2uq::residual_activation", mutates_args=())
def _residual_activation(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    other: Tensor,
    other_gamma: Tensor | None,
    other_beta: Tensor | None,
    other_eps: float,
    bias_in: Tensor,
    slope: Tensor,
    bias_out: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    norm, act = NormParameters(gamma, beta, eps), PReLUParameters(bias_in, slope, bias_out)
    second = norm_parameters((other_gamma, other_beta), other_eps)
    result: tuple[Tensor, Tensor, Tensor] = load(OP, x.device, backend).forward(x, norm, other, second, act)
    return result


@_residual_activation.register_fake
def _(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    other: Tensor,
    other_gamma: Tensor | None,
    other_beta: Tensor | None,
    other_eps: float,
    bias_in: Tensor,
    slope: Tensor,
    bias_out: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty(2, x.shape[1], dtype=torch.float32)
    other_stats = x.new_empty(2, 0 if other_gamma is None else x.shape[1], dtype=torch.float32)
    return load(OP, x.device, backend).empty_map(x, x.dtype), stats, other_stats


@torch.library.custom_op("lightning_n2uq::residual_activation_backward", mutates_args=())
def _residual_activation_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    other: Tensor,
    other_stats: Tensor,
    other_norm: Sequence[Tensor],
    other_eps: float,
    act: Sequence[Tensor],
    backend: str,
) -> list[Tensor]:
    """Returns `ResidualGradients` without None."""
    first, second = norm_parameters(norm, eps), norm_parameters(other_norm, other_eps)
    kernels = load(OP, x.device, backend)
    grads: ResidualGradients = kernels.backward(
        grad, x, stats, first, other, other_stats, second, PReLUParameters(*act)
    )
    return present(grads)


@_residual_activation_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    other: Tensor,
    other_stats: Tensor,
    other_norm: Sequence[Tensor],
    other_eps: float,
    act: Sequence[Tensor],
    backend: str,
) -> list[Tensor]:
    kernels = load(OP, x.device, backend)
    maps = [kernels.empty_map(x, x.dtype), kernels.empty_map(x, other.dtype)]
    return [*maps, *(p.new_empty(p.shape) for p in (*norm, *act, *other_norm))]


_gradients_of = undispatched(_residual_activation_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
    x, gamma, beta, ctx.eps, other, other_gamma, other_beta, ctx.other_eps, *act, ctx.backend = inputs
    _, stats, other_stats = output
    ctx.save_for_backward(x, stats, other, other_stats, gamma, beta, other_gamma, other_beta, *act)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    x, stats, other, other_stats, gamma, beta, other_gamma, other_beta, *act = ctx.saved_tensors
    norm, second = [gamma, beta], present((other_gamma, other_beta))
    first, branch = (x, stats, norm, ctx.eps), (other, other_stats, second, ctx.other_eps)
    found = _gradients_of(grad, *first, *branch, act, ctx.backend)
    known = [True] * 7 + [other_gamma is not None, other_beta is not None]
    grads = ResidualGradients(*restored(found, known))  # type: ignore[arg-type]
    shortcut = grads.other, grads.other_gamma, grads.other_beta
    behind = grads.bias_in, grads.slope, grads.bias_out
    return grads.x, grads.gamma, grads.beta, None, *shortcut, None, *behind, None


_apply = differentiable(_residual_activation, _setup_context, _backward)
