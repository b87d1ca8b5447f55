"""The fused chain, a block's end and the stem by Triton, as operators on channels-last maps.

Arguments are those of the operators of the same name in `packed`, `residual` and `stem`, which choose; so are
gradients. They are operators of their own because what they keep and the layouts they promise differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_n2uq.ops.kernels import block_cuda, packed_cuda, stem_cuda
from lightning_n2uq.ops.kernels.channels_cuda import empty_map


def _given(*parameters: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(p for p in parameters if p is not None)


@torch.library.custom_op("lightning_n2uq::packed_activation_triton", mutates_args=())
def packed_activation(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    bias_in: Tensor | None,
    slope: Tensor | None,
    bias_out: Tensor | None,
    start: Tensor,
    widths: Tensor,
    scale_in: Tensor,
    scale_out: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The quantized map, its packed codes, and the batch's statistics."""
    norm, act = _given(gamma, beta), _given(bias_in, slope, bias_out)
    return packed_cuda.forward(x, norm, eps, act, (start, widths, scale_in, scale_out), dtype)


@packed_activation.register_fake
def _(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    bias_in: Tensor | None,
    slope: Tensor | None,
    bias_out: Tensor | None,
    start: Tensor,
    widths: Tensor,
    scale_in: Tensor,
    scale_out: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    packed = x.new_empty(packed_cuda.packed_size(x, widths.numel()), dtype=torch.uint8)
    return empty_map(x, dtype), packed, _fake_stats(x, gamma)


def _fake_stats(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x.new_empty(2, 0 if gamma is None else x.shape[1], dtype=torch.float32)


@torch.library.custom_op("lightning_n2uq::packed_activation_triton_backward", mutates_args=())
def packed_activation_backward(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    stats: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    bias_in: Tensor | None,
    slope: Tensor | None,
    bias_out: Tensor | None,
    start: Tensor,
    widths: Tensor,
    scale_in: Tensor,
    scale_out: Tensor,
) -> list[Tensor]:
    """Gradients of `x` and of those parameters that there are, in the order of the arguments."""
    norm, act = _given(gamma, beta), _given(bias_in, slope, bias_out)
    quantizer = start, widths, scale_in, scale_out
    return packed_cuda.backward(grad, x, packed, stats, norm, eps, act, quantizer)


@packed_activation_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    stats: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    bias_in: Tensor | None,
    slope: Tensor | None,
    bias_out: Tensor | None,
    start: Tensor,
    widths: Tensor,
    scale_in: Tensor,
    scale_out: Tensor,
) -> list[Tensor]:
    parameters = _given(gamma, beta, bias_in, slope, bias_out, start, widths, scale_in, scale_out)
    return [empty_map(x, x.dtype), *(p.new_empty(p.shape) for p in parameters)]


def _keep_chain(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
    x, gamma, beta, ctx.eps, *parameters, _ = inputs
    ctx.save_for_backward(x, output[1], output[2], gamma, beta, *parameters)


def _chain_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    x, packed, stats, gamma, beta, *parameters = ctx.saved_tensors
    found = packed_activation_backward(grad, x, packed, stats, gamma, beta, ctx.eps, *parameters)
    grads = iter(found)
    dx, dgamma, dbeta, *rest = (next(grads) if p is not None else None for p in (x, gamma, beta, *parameters))
    return dx, dgamma, dbeta, None, *rest, None


packed_activation.register_autograd(_chain_backward, setup_context=_keep_chain)


@torch.library.custom_op("lightning_n2uq::residual_activation_triton", mutates_args=())
def residual_activation(
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
    """The value and the statistics of both branches."""
    second = _norm(other_gamma, other_beta, other_eps)
    return block_cuda.residual(x, (gamma, beta, eps), other, second, (bias_in, slope, bias_out))


@residual_activation.register_fake
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
    return empty_map(x, x.dtype), _fake_stats(x, gamma), _fake_stats(x, other_gamma)


@torch.library.custom_op("lightning_n2uq::residual_activation_triton_backward", mutates_args=())
def residual_activation_backward(
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
    second, act = _norm(other_gamma, other_beta, other_eps), (bias_in, slope, bias_out)
    return block_cuda.residual_gradient(grad, x, stats, (gamma, beta, eps), other, other_stats, second, act)


@residual_activation_backward.register_fake
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
    parameters = _given(gamma, beta, bias_in, slope, bias_out, other_gamma, other_beta)
    maps = empty_map(x, x.dtype), empty_map(other, other.dtype)
    return [*maps, *(p.new_empty(p.shape) for p in parameters)]


def _norm(gamma: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor, float] | None:
    return None if gamma is None or beta is None else (gamma, beta, eps)


def _keep_block(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
    x, gamma, beta, ctx.eps, other, other_gamma, other_beta, ctx.other_eps, *act = inputs
    ctx.save_for_backward(x, output[1], gamma, beta, other, output[2], other_gamma, other_beta, *act)


def _block_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    x, stats, gamma, beta, other, other_stats, other_gamma, other_beta, *act = ctx.saved_tensors
    first, second = (gamma, beta, ctx.eps), (other_gamma, other_beta, ctx.other_eps)
    found = residual_activation_backward(grad, x, stats, *first, other, other_stats, *second, *act)
    dx, dother, dgamma, dbeta, *rest = found
    dact, dnorm = rest[:3], rest[3:] or [None, None]
    return dx, dgamma, dbeta, None, dother, *dnorm, None, *dact


residual_activation.register_autograd(_block_backward, setup_context=_keep_block)


@torch.library.custom_op("lightning_n2uq::norm_relu_pool_triton", mutates_args=())
def norm_relu_pool(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, kernel: int, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The pooled map, the places of the maxima, the statistics."""
    return stem_cuda.pool(x, (gamma, beta, eps), (kernel, stride, padding))


@norm_relu_pool.register_fake
def _(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, kernel: int, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    size = [*x.shape[:2], *stem_cuda.pooled(x, (kernel, stride, padding))]
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, empty_map(y, torch.uint8), _fake_stats(x, gamma)


@torch.library.custom_op("lightning_n2uq::norm_relu_pool_triton_backward", mutates_args=())
def norm_relu_pool_backward(
    grad: Tensor,
    taps: Tensor,
    x: Tensor,
    stats: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    kernel: int,
    stride: int,
    padding: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x`, `gamma`, `beta`."""
    return stem_cuda.pool_gradient(grad, taps, x, stats, (gamma, beta, eps), (kernel, stride, padding))


@norm_relu_pool_backward.register_fake
def _(
    grad: Tensor,
    taps: Tensor,
    x: Tensor,
    stats: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    kernel: int,
    stride: int,
    padding: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_map(x, x.dtype), gamma.new_empty(gamma.shape), beta.new_empty(beta.shape)


def _keep_stem(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
    x, gamma, beta, ctx.eps, *ctx.window = inputs
    ctx.save_for_backward(output[1], x, output[2], gamma, beta)


def _stem_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    dx, dgamma, dbeta = norm_relu_pool_backward(grad, *ctx.saved_tensors, ctx.eps, *ctx.window)
    return dx, dgamma, dbeta, None, None, None, None


norm_relu_pool.register_autograd(_stem_backward, setup_context=_keep_stem)
