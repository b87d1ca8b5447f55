"""`norm_relu_pool`: batch norm, ReLU, max pooling as one operator that keeps its input and small indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_n2uq.ops.dispatch import load, select
from lightning_n2uq.ops.eager import differentiable, undispatched
from lightning_n2uq.ops.formats.fused_activation import NormParameters, PoolGradients, Window

OP = "stem"


def norm_relu_pool(x: Tensor, norm: NormParameters, window: Window) -> tuple[Tensor, Tensor]:
    """Max pooling of `relu(batch_norm(x))`, computed in float32.

    Kept for the backward pass: `x` and one byte per output, instead of two maps and eight bytes.

    Args:
        x: `[N, C, H, W]`, float16, bfloat16 or float32.
        norm: The norm's parameters; the statistics are this batch's.
        window: The pooling window.

    Returns:
        The pooled map, dtype of `x`, in the backend's memory order (contiguous, Triton's channels-last); mean
        and biased variance, `[2, C]` float32, no gradient.
    """
    y, _, stats = _apply(x, *norm, *window, select(OP, x.device))
    return y, stats


@torch.library.custom_op("lightning_n2uq::norm_relu_pool", mutates_args=())
def _norm_relu_pool(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    kernel: int,
    stride: int,
    padding: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    norm, window = NormParameters(gamma, beta, eps), Window(kernel, stride, padding)
    result: tuple[Tensor, Tensor, Tensor] = load(OP, x.device, backend).forward(x, norm, window)
    return result


@_norm_relu_pool.register_fake
def _(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    kernel: int,
    stride: int,
    padding: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = load(OP, x.device, backend)
    size = [*x.shape[:2], *Window(kernel, stride, padding).pooled(x.shape[2:])]
    y, taps = kernels.empty_map(x, x.dtype, size), kernels.empty_map(x, torch.uint8, size)
    return y, taps, x.new_empty(2, x.shape[1], dtype=torch.float32)


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    norm, window = NormParameters(gamma, beta, eps), Window(kernel, stride, padding)
    grads: PoolGradients = load(OP, x.device, backend).backward(grad, taps, x, stats, norm, window)
    return grads


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    dx = load(OP, x.device, backend).empty_map(x, x.dtype)
    return dx, gamma.new_empty(gamma.shape), beta.new_empty(beta.shape)


_gradients_of = undispatched(_norm_relu_pool_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
    x, gamma, beta, ctx.eps, *ctx.window, ctx.backend = inputs
    _, taps, stats = output
    ctx.save_for_backward(taps, x, stats, gamma, beta)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    found = _gradients_of(grad, *ctx.saved_tensors, ctx.eps, *ctx.window, ctx.backend)
    grads = PoolGradients(*found)
    return grads.x, grads.gamma, grads.beta, None, None, None, None, None


_apply = differentiable(_norm_relu_pool, _setup_context, _backward)
