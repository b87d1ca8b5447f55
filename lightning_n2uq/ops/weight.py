"""`quantize_weight`: the entropy-preserving weight quantizer of N2UQ as a custom operator."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_n2uq.ops import kernels, reference
from lightning_n2uq.ops.threshold import _FLOATS

GRADIENTS = ("scaled", "straight_through")


def quantize_weight(weight: Tensor, bits: int, gradient: str = "scaled") -> Tensor:
    """Quantizes weights per output channel to odd multiples of `S / n` (N2UQ, CVPR 2022, section 3).

    `S = (2^b - 1) / 2^(b-1) * mean |W|` over all but dim 0, `n = 2^b - 1`; `clamp(W / S, -1, 1)` is rounded
    (half to even) to the nearest of the levels `-n, -n + 2, .., n` (times `1 / n`), then scaled back. The
    scale spreads the weights evenly over the levels, so that their distribution keeps its entropy.

    Gradient: `scaled` (default, the published code's) hands the upstream gradient times `1 / S` to the
    weight; `straight_through` hands it on unchanged. Neither clips, and none flows through `S`.

    Args:
        weight: `[C, ...]`, at least 2-D, floating; computed in float32 (float64 for float64).
        bits: 1 to 8.
        gradient: `scaled` or `straight_through`.

    Returns:
        Shape and dtype of `weight`; a channel of zeros gives zeros, a NaN or an infinity stays visible.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value.
    """
    if weight.dtype not in _FLOATS:
        raise ValueError(f"weight: got dtype {weight.dtype}, allowed are {', '.join(map(str, _FLOATS))}")
    if weight.dim() < 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, allowed is [channels, ...], 2-D or more")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits: got {bits!r}, allowed is 1 to 8")
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient: got {gradient!r}, allowed are {', '.join(GRADIENTS)}")
    quantized: Tensor = _quantize_weight(weight, bits, gradient == "straight_through")
    return quantized


@torch.library.custom_op("lightning_n2uq::quantize_weight", mutates_args=())
def _quantize_weight(weight: Tensor, bits: int, straight_through: bool) -> Tensor:
    fast = kernels.load("quantize_weight", weight.device)
    if fast is None:
        return torch.empty_like(weight).copy_(reference.quantize_weight(weight, bits))
    quantized: Tensor = fast.forward(weight, bits)
    return quantized


@_quantize_weight.register_fake
def _(weight: Tensor, bits: int, straight_through: bool) -> Tensor:
    return torch.empty_like(weight)


@torch.library.custom_op("lightning_n2uq::quantize_weight_backward", mutates_args=())
def _quantize_weight_backward(grad: Tensor, weight: Tensor, bits: int, straight_through: bool) -> Tensor:
    fast = kernels.load("quantize_weight", weight.device)
    if fast is None or straight_through:
        value = reference.quantize_weight_backward(grad, weight, bits, straight_through)
        return torch.empty_like(weight).copy_(value)
    dw: Tensor = fast.backward(grad, weight, bits)
    return dw


@_quantize_weight_backward.register_fake
def _(grad: Tensor, weight: Tensor, bits: int, straight_through: bool) -> Tensor:
    return torch.empty_like(weight)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    weight, ctx.bits, ctx.straight_through = inputs
    ctx.save_for_backward(weight)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    return _quantize_weight_backward(grad, weight, ctx.bits, ctx.straight_through), None, None


_quantize_weight.register_autograd(_backward, setup_context=_setup_context)
