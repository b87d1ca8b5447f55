"""`residual_activation`: the end of a residual block as one operator that keeps no map of its own.

Its backward pass recomputes the sum from the convolution's output and the shortcut's, which other layers keep
anyway: batch norm the former, the block's first convolution the latter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_n2uq.ops import block_reference, kernels
from lightning_n2uq.ops.packed import norm_of
from lightning_n2uq.ops.packed_format import Activation, batch_norm, planes

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
    operator: Any = _residual_activation
    if kernels.has_triton_operators("triton_chain", OP, x.device.type):
        operator = torch.ops.lightning_n2uq.residual_activation_triton
    result: tuple[Tensor, Tensor, Tensor] = operator(
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
    fast = kernels.load(OP, x.device) or block_reference
    source, second = planes(x), planes(other)
    stats = torch.stack(fast.statistics(source)).float()
    other_stats = source.new_empty(2, 0)
    if other_gamma is not None:
        other_stats = torch.stack(fast.statistics(second)).float()
    norm = batch_norm(stats, gamma, beta, eps)
    other_norm = norm_of(other_stats, other_gamma, other_beta, other_eps)
    y = fast.residual(source, norm, second, other_norm, Activation(bias_in, slope, bias_out))
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
    return x.new_empty(x.shape), stats, other_stats


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
    fast = kernels.load(OP, x.device) or block_reference
    norm = batch_norm(stats, gamma, beta, eps)
    other_norm = norm_of(other_stats, other_gamma, other_beta, other_eps)
    act = Activation(bias_in, slope, bias_out)
    dx, dother, sums, other_sums = fast.residual_gradient(
        planes(grad), planes(x), norm, planes(other), other_norm, act
    )
    grads = [sums[:, 3] * norm.inverse.double(), sums[:, 0], sums[:, 0], sums[:, 1], sums[:, 2]]
    parameters = [gamma, beta, *act]
    if other_norm is not None:
        grads += [other_sums[:, 3] * other_norm.inverse.double(), other_sums[:, 0]]
        parameters += [p for p in (other_gamma, other_beta) if p is not None]
    dx, dother = dx.reshape(x.shape).to(x.dtype), dother.reshape(x.shape).to(other.dtype)
    return [dx, dother, *(g.to(p.dtype).clone() for g, p in zip(grads, parameters, strict=True))]


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
    parameters = (x, other, gamma, beta, bias_in, slope, bias_out, other_gamma, other_beta)
    return [p.new_empty(p.shape) for p in parameters if p is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
    x, gamma, beta, ctx.eps, other, other_gamma, other_beta, ctx.other_eps, *act = inputs
    ctx.save_for_backward(x, output[1], gamma, beta, other, output[2], other_gamma, other_beta, *act)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    x, stats, gamma, beta, other, other_stats, other_gamma, other_beta, *act = ctx.saved_tensors
    dx, dother, dgamma, dbeta, *rest = _residual_activation_backward(
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


_residual_activation.register_autograd(_backward, setup_context=_setup_context)
