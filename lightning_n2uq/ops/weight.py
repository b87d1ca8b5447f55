"""`quantize_weight`: the entropy-preserving weight quantizer of N2UQ as a custom operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_n2uq.ops import backends, reference
from lightning_n2uq.ops.eager import differentiable, watched
from lightning_n2uq.ops.layout import flat, flat_like
from lightning_n2uq.ops.tables import compute_dtype
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
    return quantize_weight_with_scale(weight, bits, gradient)[0]


def quantize_weight_with_scale(weight: Tensor, bits: int, gradient: str = "scaled") -> tuple[Tensor, Tensor]:
    """`quantize_weight` and the scale `S` `[C, 1, ..]` in the compute dtype, which has no gradient."""
    if weight.dtype not in _FLOATS:
        raise ValueError(f"weight: got dtype {weight.dtype}, allowed are {', '.join(map(str, _FLOATS))}")
    if weight.dim() < 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, allowed is [channels, ...], 2-D or more")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits: got {bits!r}, allowed is 1 to 8")
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient: got {gradient!r}, allowed are {', '.join(GRADIENTS)}")
    quantized, scale = _apply(weight, bits, gradient == "straight_through")
    return quantized, scale.detach()


def apply_scale(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The quantized weight for a scale that is known already: the same bits, no gradient."""
    quantized = torch.empty_like(weight)
    fast = backends.load("quantize_weight", weight.device)
    if fast is None or not _channels_outermost(quantized):
        return quantized.copy_(reference.quantize_weight(weight, bits))
    fast.forward(flat_like(weight.detach(), quantized), scale.reshape(-1), bits, flat(quantized))
    return quantized


def through_scale(grad: Tensor, scale: Tensor, dtype: torch.dtype, *, owned: bool) -> Tensor:
    """The gradient of the quantized weight divided by the scale.

    A channel of zeros has no scale; there the gradient passes as it is.

    Args:
        grad: `[C, ...]`.
        scale: `[C, 1, ..]`.
        dtype: of the result.
        owned: whether `grad` may be overwritten.
    """
    fast = None if watched((grad,)) else backends.load("quantize_weight", grad.device)
    if fast is None or not hasattr(fast, "gradient") or not _one_run(grad):
        divisor, wide = torch.where(scale == 0, 1.0, scale), grad.to(scale.dtype)
        return (wide.div_(divisor) if owned else wide / divisor).to(dtype)
    target = grad if owned and grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
    fast.gradient(flat(grad), scale.reshape(-1), flat(target))
    return target


@torch.library.custom_op("lightning_n2uq::quantize_weight", mutates_args=())
def _quantize_weight(weight: Tensor, bits: int, straight_through: bool) -> tuple[Tensor, Tensor]:
    quantized = torch.empty_like(weight)
    fast = backends.load("quantize_weight", weight.device)
    if fast is None or weight.dtype == torch.float64 or not _channels_outermost(quantized):
        scale = reference.weight_scale(weight, bits)
        return apply_scale(weight, scale, bits), scale
    scale = _empty_scale(weight)
    source = flat_like(weight.detach(), quantized)
    fast.forward(source, scale.reshape(-1), bits, flat(quantized), measure=True)
    return quantized, scale


@_quantize_weight.register_fake
def _(weight: Tensor, bits: int, straight_through: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), _empty_scale(weight)


def _empty_scale(weight: Tensor) -> Tensor:
    size = (weight.shape[0],) + (1,) * (weight.dim() - 1)
    return weight.new_empty(size, dtype=compute_dtype(weight.dtype))


def _one_run(x: Tensor) -> bool:
    """Whether `x` is one run in memory, channel (dim 0) after channel."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _channels_outermost(x: Tensor) -> bool:
    """Whether every channel (dim 0) is one run in memory; so for contiguous and channels-last weights."""
    return x.stride(0) * x.shape[0] == x.numel()


def _setup_context(ctx: Any, inputs: tuple[Tensor, int, bool], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    ctx.dtype, ctx.straight_through = inputs[0].dtype, inputs[2]
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad: Tensor, scale_grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
    if not ctx.straight_through:
        (scale,) = ctx.saved_tensors
        grad = through_scale(grad, scale, ctx.dtype, owned=False)
    return grad, None, None


_apply = differentiable(_quantize_weight, _setup_context, _backward)
