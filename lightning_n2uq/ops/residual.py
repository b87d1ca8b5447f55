"""`residual_activation`: the end of a residual block as one operator that keeps no map of its own.

Its backward pass recomputes the sum from the convolution's output and the shortcut's, which other layers keep
anyway: batch norm the former, the block's first convolution the latter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_n2uq.ops import backends
from lightning_n2uq.ops.backends.reference import residual as residual_reference
from lightning_n2uq.ops.eager import differentiable, undispatched
from lightning_n2uq.ops.formats.fused_activation import Activation, batch_norm, planes
from lightning_n2uq.ops.fused_activation import channels_last_kernels, empty_gradient, norm_of

OP = "residual_block"


def residual_activation(
    x: Tensor,
    norm: tuple[Tensor, Tensor, float],
    other: Tensor,
    other_norm: tuple[Tensor, Tensor, float] | None,
    act: Activation,
) -> tuple[Tensor, Tensor, Tensor]:
    """`prelu(norm(x) + other_norm(other) + bias) + bias`; batch norms use this batch; float32 throughout.

    Args:
        x: `[N, C, H, W]`, float16, bfloat16 or float32.
        norm: `gamma, beta` `[C]` and `eps`.
        other: the shortcut, shape of `x`.
        other_norm: `gamma, beta` `[C]` and `eps`; None adds the shortcut as it is.
        act: `[C]` each.

    Returns:
        The sum's activation, contiguous (channels-last by Triton's kernels), dtype of `x`; mean and biased
        variance of `x` and of `other`, `[2, C]` float32 each (the latter `[2, 0]` without a norm). Only the
        first has a gradient.
    """
    gamma, beta, eps = norm
    other_gamma, other_beta, other_eps = other_norm or (None, None, 0.0)
    result: tuple[Tensor, Tensor, Tensor] = _apply(
        x, gamma, beta, eps, other, other_gamma, other_beta, other_eps, *act
    )
    return result


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
) -> tuple[Tensor, Tensor, Tensor]:
    triton, act = channels_last_kernels(x.device, OP), Activation(bias_in, slope, bias_out)
    if triton is not None:
        second_norm = _given(other_gamma, other_beta, other_eps)
        found: tuple[Tensor, Tensor, Tensor] = triton.residual(x, (gamma, beta, eps), other, second_norm, act)
        return found
    fast = backends.load(OP, x.device) or residual_reference
    source, second = planes(x), planes(other)
    stats = torch.stack(fast.statistics(source)).float()
    other_stats = source.new_empty(2, 0)
    if other_gamma is not None:
        other_stats = torch.stack(fast.statistics(second)).float()
    norm = batch_norm(stats, gamma, beta, eps)
    other_norm = norm_of(other_stats, other_gamma, other_beta, other_eps)
    y = fast.residual(source, norm, second, other_norm, act)
    return y.reshape(x.shape).to(x.dtype), stats, other_stats


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
) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty(2, x.shape[1], dtype=torch.float32)
    other_stats = x.new_empty(2, 0 if other_gamma is None else x.shape[1], dtype=torch.float32)
    return empty_gradient(x, OP), stats, other_stats


def _given(gamma: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor, float] | None:
    return None if gamma is None or beta is None else (gamma, beta, eps)


@torch.library.custom_op("lightning_n2uq::residual_activation_backward", mutates_args=())
def _residual_activation_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    other: Tensor,
    other_stats: Tensor,
    other_gamma: Tensor | None,
    other_beta: Tensor | None,
    other_eps: float,
    bias_in: Tensor,
    slope: Tensor,
    bias_out: Tensor,
) -> list[Tensor]:
    """Gradients of `x, other, gamma, beta, bias_in, slope, bias_out` and of the shortcut's norm, if any."""
    triton, act = channels_last_kernels(x.device, OP), Activation(bias_in, slope, bias_out)
    if triton is not None:
        second_norm = _given(other_gamma, other_beta, other_eps)
        found: list[Tensor] = triton.residual_gradient(
            grad, x, stats, (gamma, beta, eps), other, other_stats, second_norm, act
        )
        return found
    fast = backends.load(OP, x.device) or residual_reference
    norm = batch_norm(stats, gamma, beta, eps)
    other_norm = norm_of(other_stats, other_gamma, other_beta, other_eps)
    dx, dother, sums, other_sums = fast.residual_gradient(
        planes(grad), planes(x), norm, planes(other), other_norm, act
    )
    grads = [sums[:, 3] * norm.inverse.double(), sums[:, 0], sums[:, 0], sums[:, 1], sums[:, 2]]
    parameters = [gamma, beta, *act]
    if other_norm is not None:
        grads += [other_sums[:, 3] * other_norm.inverse.double(), other_sums[:, 0]]
        parameters += [p for p in (other_gamma, other_beta) if p is not None]
    dx, dother = dx.reshape(x.shape).to(x.dtype), dother.reshape(x.shape).to(other.dtype)
    return [dx, dother, *(g.to(p.dtype, copy=True) for g, p in zip(grads, parameters, strict=True))]


@_residual_activation_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    other: Tensor,
    other_stats: Tensor,
    other_gamma: Tensor | None,
    other_beta: Tensor | None,
    other_eps: float,
    bias_in: Tensor,
    slope: Tensor,
    bias_out: Tensor,
) -> list[Tensor]:
    parameters = (gamma, beta, bias_in, slope, bias_out, other_gamma, other_beta)
    gradients = [p.new_empty(p.shape) for p in parameters if p is not None]
    return [empty_gradient(x, OP), empty_gradient(other, OP), *gradients]


_gradients_of = undispatched(_residual_activation_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
    x, gamma, beta, ctx.eps, other, other_gamma, other_beta, ctx.other_eps, *act = inputs
    ctx.save_for_backward(x, output[1], gamma, beta, other, output[2], other_gamma, other_beta, *act)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    x, stats, gamma, beta, other, other_stats, other_gamma, other_beta, *act = ctx.saved_tensors
    dx, dother, dgamma, dbeta, *rest = _gradients_of(
        grad,
        x,
        stats,
        gamma,
        beta,
        ctx.eps,
        other,
        other_stats,
        other_gamma,
        other_beta,
        ctx.other_eps,
        *act,
    )
    dact, dnorm = rest[:3], rest[3:] or [None, None]
    return dx, dgamma, dbeta, None, dother, *dnorm, None, *dact


_apply = differentiable(_residual_activation, _setup_context, _backward)
