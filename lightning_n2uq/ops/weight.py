"""`quantize_weight`: the entropy-preserving weight quantizer of N2UQ as a custom operator."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_n2uq.ops import reference
from lightning_n2uq.ops.dispatch import load, select
from lightning_n2uq.ops.eager import differentiable, watched
from lightning_n2uq.ops.threshold import check_floating
from lightning_n2uq.utils.validation import check_choice, check_integer

OP = "quantize_weight"
GRADIENTS = ("scaled", "straight_through")


def quantize_weight(weight: Tensor, bits: int, gradient: str = "scaled") -> Tensor:
    """Quantizes weights per output channel to odd multiples of `S / n` (N2UQ, CVPR 2022, section 3).

    `S = (2^b - 1) / 2^(b-1) * mean |W|` over all but dim 0, `n = 2^b - 1`; `clamp(W / S, -1, 1)` is rounded
    (half to even) to the nearest of the levels `-n, -n + 2, .., n` (times `1 / n`), then scaled back. The
    scale spreads the weights evenly over the levels, so that their distribution keeps its entropy.

    Gradient: `scaled` (default, the published code's) hands the upstream gradient times `1 / S` to the
    weight; `straight_through` hands it on unchanged. Neither clips, and none flows through `S`.

    Args:
        weight: The weight `[C, ...]`, at least 2-D, floating; computed in float32 (float64 for float64).
        bits: The code width, 1 to 8.
        gradient: Which gradient the weight gets, `scaled` or `straight_through`.

    Returns:
        The quantized weight in shape and dtype of `weight`; a channel of zeros gives zeros, a NaN or an
        infinity stays visible.

    Raises:
        ValueError: If an argument has a wrong shape, dtype or value.
    """
    return quantize_weight_with_scale(weight, bits, gradient)[0]


def quantize_weight_with_scale(
    weight: Tensor, bits: int, gradient: str = "scaled", dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Returns `quantize_weight`, in `dtype`, and the scale `S` `[C, 1, ..]` in the compute dtype.

    The scale has no gradient. None stands for the dtype of `weight`; another one costs no pass of its own.
    """
    check_floating("weight", weight)
    if weight.dim() < 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, allowed is [channels, ...], 2-D or more")
    check_integer("bits", bits, 1, 8)
    check_choice("gradient", gradient, GRADIENTS)
    quantized, scale = _apply(weight, bits, gradient == "straight_through", select(OP, weight.device), dtype)
    return quantized, scale.detach()


def apply_scale(
    weight: Tensor, scale: Tensor, bits: int, backend: str = "auto", dtype: torch.dtype | None = None
) -> Tensor:
    """Returns the quantized weight for a scale that is known already: the same bits, no gradient."""
    return _quantize(weight, scale, bits, backend, measure=False, dtype=dtype)


def weight_levels(weight: Tensor, bits: int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Returns the quantized weight as odd integers, int8, and the scale `S` `[C, 1, ..]`; no gradient.

    `levels * S / n` is the quantized weight. Up to 7 bits the integers fit.
    """
    found: tuple[Tensor, Tensor] = _kernels(weight, backend).levels(weight, bits)
    return found


def through_scale(
    grad: Tensor, scale: Tensor, dtype: torch.dtype, *, owned: bool, backend: str = "auto"
) -> Tensor:
    """Returns the gradient of the quantized weight divided by the scale.

    A channel of zeros has no scale; there the gradient passes as it is.

    Args:
        grad: The gradient `[C, ...]`.
        scale: The scale `S` `[C, 1, ..]`.
        dtype: The dtype of the result.
        owned: Whether `grad` may be overwritten.
        backend: What `dispatch.select` has answered in the forward pass.
    """
    kernels = load(OP, grad.device, "reference" if watched((grad,)) else backend)
    result: Tensor = kernels.gradient(grad, scale, dtype, owned)
    return result


def _kernels(weight: Tensor, backend: str) -> ModuleType:
    """Returns the backend's module, or plain torch's where a channel (dim 0) is not one run of memory."""
    runs = weight.stride(0) * weight.shape[0] == weight.numel()
    return load(OP, weight.device, backend if runs else "reference")


def _quantize(
    weight: Tensor, scale: Tensor, bits: int, backend: str, *, measure: bool, dtype: torch.dtype | None
) -> Tensor:
    """Runs the backend's `quantize`; a weight in half precision is rounded to its own dtype first."""
    wanted = dtype or weight.dtype
    direct = wanted if weight.dtype == torch.float32 else weight.dtype
    quantized: Tensor = _kernels(weight, backend).quantize(weight, scale, bits, measure, direct)
    return quantized.to(wanted)


@torch.library.custom_op("lightning_n2uq::quantize_weight", mutates_args=())
def _quantize_weight(
    weight: Tensor,
    bits: int,
    straight_through: bool,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    wide = weight.dtype == torch.float64  # in which the order of a backend's sum would show
    scale = reference.weight_scale(weight, bits) if wide else reference.empty_scale(weight)
    return _quantize(weight, scale, bits, backend, measure=not wide, dtype=dtype), scale


@_quantize_weight.register_fake
def _(
    weight: Tensor,
    bits: int,
    straight_through: bool,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, dtype=dtype), reference.empty_scale(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    weight, _, ctx.straight_through, ctx.backend, *_ = inputs
    ctx.dtype = weight.dtype
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad: Tensor, scale_grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # noqa: ANN401
    if ctx.straight_through:
        return grad.to(ctx.dtype), None, None, None, None
    (scale,) = ctx.saved_tensors
    through = through_scale(grad, scale, ctx.dtype, owned=False, backend=ctx.backend)
    return through, None, None, None, None


_apply = differentiable(_quantize_weight, _setup_context, _backward)
