"""`norm_relu_pool`: batch norm, ReLU, max pooling as one operator that keeps its input and small indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_n2uq.ops import backends
from lightning_n2uq.ops.backends.reference import stem as stem_reference
from lightning_n2uq.ops.eager import differentiable, undispatched
from lightning_n2uq.ops.formats.fused_activation import batch_norm
from lightning_n2uq.ops.fused_activation import channels_last_kernels, empty_gradient

OP = "stem"


def norm_relu_pool(
    x: Tensor, norm: tuple[Tensor, Tensor, float], window: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Max pooling of `relu(batch_norm(x))`, computed in float32.

    Kept for the backward pass: `x` and one byte per output, instead of two maps and eight bytes.

    Args:
        x: `[N, C, H, W]`, float16, bfloat16 or float32.
        norm: `gamma, beta` `[C]` and `eps`; the statistics are this batch's.
        window: kernel (up to 15), stride, padding (at most half the kernel).

    Returns:
        The pooled map, contiguous (channels-last by Triton's kernels), dtype of `x`; mean and biased
        variance, `[2, C]` float32, no gradient.
    """
    y, _, stats = _apply(x, *norm, *window)
    return y, stats


def _pooled(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


@torch.library.custom_op("lightning_n2uq::norm_relu_pool", mutates_args=())
def _norm_relu_pool(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, kernel: int, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    triton = channels_last_kernels(x.device, OP)
    if triton is not None:
        found: tuple[Tensor, Tensor, Tensor] = triton.pool(x, (gamma, beta, eps), (kernel, stride, padding))
        return found
    fast = backends.load(OP, x.device) or stem_reference
    source, window = x.detach().float().contiguous(), (kernel, stride, padding)
    stats = torch.stack(fast.statistics(source.flatten(2))).float()
    size = _pooled(x.shape[2], *window), _pooled(x.shape[3], *window)
    y, taps = fast.pool(source, batch_norm(stats, gamma, beta, eps), size, window)
    return y.to(x.dtype), taps, stats


@_norm_relu_pool.register_fake
def _(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, kernel: int, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    window = kernel, stride, padding
    shape = (*x.shape[:2], _pooled(x.shape[2], *window), _pooled(x.shape[3], *window))
    y = x.new_empty(shape)
    if channels_last_kernels(x.device, OP) is not None:
        y = torch.empty_like(y, memory_format=torch.channels_last)
    return y, torch.empty_like(y, dtype=torch.uint8), x.new_empty(2, x.shape[1], dtype=torch.float32)


@torch.library.custom_op("lightning_n2uq::norm_relu_pool_backward", mutates_args=())
def _norm_relu_pool_backward(
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
    triton = channels_last_kernels(x.device, OP)
    if triton is not None:
        window = kernel, stride, padding
        found: tuple[Tensor, Tensor, Tensor] = triton.pool_gradient(
            grad, taps, x, stats, (gamma, beta, eps), window
        )
        return found
    fast = backends.load(OP, x.device) or stem_reference
    norm = batch_norm(stats, gamma, beta, eps)
    source = x.detach().float().contiguous()
    grad = grad.detach().float().contiguous()
    dx, sums = fast.pool_gradient(grad, taps, source, norm, (kernel, stride, padding))
    dgamma = (sums[:, 3] * norm.inverse.double()).to(gamma.dtype)
    return dx.to(x.dtype), dgamma, sums[:, 0].to(beta.dtype, copy=True)


@_norm_relu_pool_backward.register_fake
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
    return empty_gradient(x, OP), gamma.new_empty(gamma.shape), beta.new_empty(beta.shape)


_gradients_of = undispatched(_norm_relu_pool_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
    x, gamma, beta, ctx.eps, *ctx.window = inputs
    ctx.save_for_backward(output[1], x, output[2], gamma, beta)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    dx, dgamma, dbeta = _gradients_of(grad, *ctx.saved_tensors, ctx.eps, *ctx.window)
    return dx, dgamma, dbeta, None, None, None, None


_apply = differentiable(_norm_relu_pool, _setup_context, _backward)
