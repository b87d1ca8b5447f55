"""The pre-activation chain as one operator, and a convolution that keeps packed codes for its backward pass.

A quantized convolution's input takes 2^b values only: `b` bits each rebuild it exactly. `packed_activation`
maps its input through batch norm, bias, PReLU, bias and the quantizer (N2UQ, CVPR 2022, figure 2) and keeps
nothing but that input; `packed_conv2d` keeps the codes instead of the floats.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_n2uq.ops import backends
from lightning_n2uq.ops.backends.reference import fused_activation as fused_reference
from lightning_n2uq.ops.dispatch import kernel_for
from lightning_n2uq.ops.eager import differentiable, undispatched
from lightning_n2uq.ops.formats.fused_activation import Activation, Norm, batch_norm, packed_bytes, planes
from lightning_n2uq.ops.tables import QuantizerParameters, operator_tables, parameter_gradients

OP = "packed_activation"


def kernel(x: Tensor) -> ModuleType:
    """The kernels for `x`, or the oracle, which has the same functions."""
    return backends.load(OP, x.device) or fused_reference


def channels_last_kernels(device: torch.device, op: str = OP) -> Any:  # noqa: ANN401
    """The Triton kernels, which take maps in channels-last order as they are, or None where others run."""
    return backends.load(op, device) if kernel_for(op, device) == "triton" else None


def kernels_of(packed: Tensor | None) -> Any:  # noqa: ANN401
    """The Triton kernels if it is they that have packed the codes, into one run of bytes; else None."""
    if packed is None or packed.dim() > 1:
        return None
    from lightning_n2uq.ops.backends.triton import fused_activation

    return fused_activation


def empty_gradient(x: Tensor, op: str = OP) -> Tensor:
    """An empty map in the order in which the kernels of an operator leave the gradient of `x`."""
    if channels_last_kernels(x.device, op) is not None:
        return torch.empty_like(x, memory_format=torch.channels_last)
    return x.new_empty(x.shape)


def packed_activation(
    x: Tensor,
    norm: tuple[Tensor, Tensor] | None,
    eps: float,
    act: Activation | None,
    quantizer: tuple[Tensor, Tensor, Tensor, Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm (of this batch), bias, PReLU, bias, threshold quantizer; every step computed in float32.

    Gradients: those of the steps one after the other, the quantizer's as in `threshold_quantize`. They are
    computed from `x` alone.

    Args:
        x: `[N, C, ...]`, float16, bfloat16 or float32.
        norm: `gamma, beta`, `[C]` each; None leaves the norm out.
        eps: of the norm.
        act: `[C]` each; None leaves both biases and PReLU out.
        quantizer: `start, widths, scale_in, scale_out` as for `threshold_quantize`.
        dtype: of the result.

    Returns:
        The quantized chain in `dtype`, contiguous (channels-last by Triton's kernels); its packed codes,
        uint8 `[N, C, bytes]` (`[bytes]` by Triton's); mean and biased variance of the batch, `[2, C]` float32
        (`[2, 0]` without a norm). Only the first has a gradient.
    """
    gamma, beta = norm or (None, None)
    bias_in, slope, bias_out = act or (None, None, None)
    result: tuple[Tensor, Tensor, Tensor] = _apply(
        x, gamma, beta, eps, bias_in, slope, bias_out, *quantizer, dtype
    )
    return result


def norm_of(stats: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Norm | None:
    """`batch_norm`, or None where there is no norm."""
    return None if gamma is None or beta is None else batch_norm(stats, gamma, beta, eps)


def _given(*parameters: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(p for p in parameters if p is not None)


def _act_of(bias_in: Tensor | None, slope: Tensor | None, bias_out: Tensor | None) -> Activation | None:
    if bias_in is None or slope is None or bias_out is None:
        return None
    return Activation(bias_in, slope, bias_out)


@torch.library.custom_op("lightning_n2uq::packed_activation", mutates_args=())
def _packed_activation(
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
    triton = channels_last_kernels(x.device)
    if triton is not None:
        given, quantizer = _given(bias_in, slope, bias_out), (start, widths, scale_in, scale_out)
        found: tuple[Tensor, Tensor, Tensor] = triton.forward(
            x, _given(gamma, beta), eps, given, quantizer, dtype
        )
        return found
    fast, source = kernel(x), planes(x)
    stats = torch.stack(fast.statistics(source)).float() if gamma is not None else source.new_empty(2, 0)
    tables = operator_tables(QuantizerParameters(start, widths, scale_in, scale_out), torch.float32)
    norm, act = norm_of(stats, gamma, beta, eps), _act_of(bias_in, slope, bias_out)
    y, packed = fast.forward(source, norm, act, tables)
    return y.reshape(x.shape).to(dtype), packed, stats


@_packed_activation.register_fake
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
    stats = x.new_empty(2, 0 if gamma is None else x.shape[1], dtype=torch.float32)
    triton = channels_last_kernels(x.device)
    if triton is not None:
        packed = x.new_empty(triton.packed_size(x, widths.numel()), dtype=torch.uint8)
        return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last), packed, stats
    size = packed_bytes(x.shape[2:].numel(), widths.numel().bit_length())
    packed = x.new_empty(x.shape[0], x.shape[1], size, dtype=torch.uint8)
    return x.new_empty(x.shape, dtype=dtype), packed, stats


@torch.library.custom_op("lightning_n2uq::packed_activation_backward", mutates_args=())
def _packed_activation_backward(
    grad: Tensor,
    x: Tensor,
    packed: Tensor | None,
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
    """Gradients of `x`, `gamma`, `beta`, the activation's three and the quantizer's four, those that are.

    Triton's kernels read the codes, which save them a search; others are given none.
    """
    triton = kernels_of(packed)
    if triton is not None:
        given, quantizer = _given(bias_in, slope, bias_out), (start, widths, scale_in, scale_out)
        found: list[Tensor] = triton.backward(
            grad, x, packed, stats, _given(gamma, beta), eps, given, quantizer
        )
        return found
    tables = operator_tables(QuantizerParameters(start, widths, scale_in, scale_out), torch.float32)
    norm, act = norm_of(stats, gamma, beta, eps), _act_of(bias_in, slope, bias_out)
    dx, sums, (segments, value_sum) = kernel(x).backward(
        planes(grad), planes(x), norm, act, tables, scale_out
    )
    grads = [dx.reshape(x.shape).to(x.dtype)]
    if norm is not None:
        grads += _like((sums[:, 3] * norm.inverse.double(), sums[:, 0]), (gamma, beta))
    if act is not None:
        grads += _like((sums[:, 0], sums[:, 1], sums[:, 2]), act)
    return [
        *grads,
        *parameter_gradients(segments, value_sum, QuantizerParameters(start, widths, scale_in, scale_out)),
    ]


def _like(grads: tuple[Tensor, ...], parameters: tuple[Tensor | None, ...]) -> list[Tensor]:
    return [g.to(p.dtype, copy=True) for g, p in zip(grads, parameters, strict=True) if p is not None]


@_packed_activation_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    packed: Tensor | None,
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
    parameters = (gamma, beta, bias_in, slope, bias_out, start, widths, scale_in, scale_out)
    return [empty_gradient(x), *(p.new_empty(p.shape) for p in parameters if p is not None)]


_gradients_of = undispatched(_packed_activation_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
    x, gamma, beta, ctx.eps, *parameters, _ = inputs
    packed = None if kernels_of(output[1]) is None else output[1]  # a convolution keeps them too
    ctx.save_for_backward(x, packed, output[2], gamma, beta, *parameters)


def _backward(ctx: Any, grad: Tensor, packed_grad: Tensor, stats_grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    x, packed, stats, gamma, beta, *parameters = ctx.saved_tensors
    grads = iter(_gradients_of(grad, x, packed, stats, gamma, beta, ctx.eps, *parameters))
    dx, dgamma, dbeta, *rest = (next(grads) if p is not None else None for p in (x, gamma, beta, *parameters))
    return dx, dgamma, dbeta, None, *rest, None


_apply = differentiable(_packed_activation, _setup_context, _backward)
