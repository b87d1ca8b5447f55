"""`packed_activation`: batch norm, bias, PReLU, bias and the threshold quantizer as one operator.

A quantized convolution's input takes `2^b` values only: `b` bits each rebuild it exactly. The operator maps
its input through the whole chain (N2UQ, CVPR 2022, figure 2), keeps nothing but that input, and packs the
codes for `packed_conv2d`, which keeps them instead of the floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_n2uq.ops.dispatch import load, select
from lightning_n2uq.ops.eager import differentiable, undispatched
from lightning_n2uq.ops.formats.fused_activation import (
    ActivationGradients,
    NormParameters,
    PReLUParameters,
    norm_parameters,
    prelu_parameters,
    present,
    restored,
)
from lightning_n2uq.ops.tables import QuantizerParameters
from lightning_n2uq.ops.uniform import THRESHOLDS, quantizer_parameters

OP = "packed_activation"


def packed_activation(
    x: Tensor,
    norm: NormParameters | None,
    act: PReLUParameters | None,
    quantizer: QuantizerParameters,
    dtype: torch.dtype,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm (of this batch), bias, PReLU, bias, threshold quantizer; every step computed in float32.

    Gradients: those of the steps one after the other, the quantizer's as in `threshold_quantize`. They are
    computed from `x` alone.

    Args:
        x: `[N, C, ...]`, float16, bfloat16 or float32.
        norm: The norm's parameters; None leaves the norm out.
        act: PReLU's parameters; None leaves PReLU and both biases out.
        quantizer: The quantizer's parameters, as for `threshold_quantize`.
        dtype: The result's dtype; uint8 gives the codes, without a gradient, not on Triton.
        backend: What `dispatch.select` has answered; `auto` asks it here.

    Returns:
        The quantized chain in `dtype`, in the backend's memory order (contiguous, Triton's channels-last);
        its packed codes, uint8 in the backend's format; mean and biased variance of the batch, `[2, C]`
        float32 (`[2, 0]` without a norm). Only the first has a gradient.
    """
    chosen = select(OP, x.device) if backend == "auto" else backend
    y, packed, stats = _apply(
        x, *(norm or (None, None, 0.0)), *(act or (None, None, None)), *quantizer, dtype, chosen
    )
    return y, packed, stats


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    norm, act = norm_parameters((gamma, beta), eps), prelu_parameters((bias_in, slope, bias_out))
    quantizer = QuantizerParameters(start, widths, scale_in, scale_out)
    result: tuple[Tensor, Tensor, Tensor] = load(OP, x.device, backend).forward(
        x, norm, act, quantizer, dtype
    )
    return result


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = load(OP, x.device, backend)
    packed = x.new_empty(kernels.packed_shape(x, widths.numel().bit_length()), dtype=torch.uint8)
    stats = x.new_empty(2, 0 if gamma is None else x.shape[1], dtype=torch.float32)
    return kernels.empty_map(x, dtype), packed, stats


@torch.library.custom_op("lightning_n2uq::packed_activation_backward", mutates_args=())
def _packed_activation_backward(
    grad: Tensor,
    x: Tensor,
    packed: Tensor | None,
    stats: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    act: Sequence[Tensor],
    quantizer: Sequence[Tensor],
    backend: str,
    method: str = THRESHOLDS,
    bits: int = 0,
) -> list[Tensor]:
    """Returns `ActivationGradients` without None; `packed` is what `codes_for_backward` has kept."""
    kernels = load(OP, x.device, backend)
    grads: ActivationGradients = kernels.backward(
        grad,
        x,
        packed,
        stats,
        norm_parameters(norm, eps),
        prelu_parameters(act),
        quantizer_parameters(method, bits, quantizer),
    )
    return present(grads)


@_packed_activation_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    packed: Tensor | None,
    stats: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    act: Sequence[Tensor],
    quantizer: Sequence[Tensor],
    backend: str,
    method: str = THRESHOLDS,
    bits: int = 0,
) -> list[Tensor]:
    dx = load(OP, x.device, backend).empty_map(x, x.dtype)
    return [dx, *(p.new_empty(p.shape) for p in (*norm, *act, *quantizer))]


chain_gradients = undispatched(_packed_activation_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
    x, gamma, beta, ctx.eps, *parameters, _, ctx.backend = inputs
    _, packed, stats = output
    kept = load(OP, x.device, ctx.backend).codes_for_backward(packed)
    ctx.save_for_backward(x, kept, stats, gamma, beta, *parameters)


def _backward(ctx: Any, grad: Tensor, packed_grad: Tensor, stats_grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    x, packed, stats, *parameters = ctx.saved_tensors
    norm, act, quantizer = present(parameters[:2]), present(parameters[2:5]), parameters[5:]
    found = chain_gradients(grad, x, packed, stats, norm, ctx.eps, act, quantizer, ctx.backend)
    grads = ActivationGradients(*restored(found, (p is not None for p in (x, *parameters))))  # type: ignore[arg-type]
    behind = grads.bias_in, grads.slope, grads.bias_out
    steps = grads.start, grads.widths, grads.scale_in, grads.scale_out
    return grads.x, grads.gamma, grads.beta, None, *behind, *steps, None, None


_apply = differentiable(_packed_activation, _setup_context, _backward)
