"""`packed_conv2d`: a convolution that keeps packed codes and its float weight, both of which cost no floats.

Plain autograd would keep the quantized input and the quantized weight. Here the backward pass rebuilds the
input from its codes and quantizes the weight again by the scale of the forward pass: the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_n2uq.ops.dispatch import load, select
from lightning_n2uq.ops.eager import differentiable, undispatched
from lightning_n2uq.ops.formats.fused_activation import ConvGradients, present, restored
from lightning_n2uq.ops.fused_activation import OP
from lightning_n2uq.ops.weight import apply_scale, through_scale


class PackedInput(NamedTuple):
    """A convolution's input.

    Attributes:
        y: `[N, C_in, H, W]`, from `packed_activation`; not kept.
        packed: Its packed codes, uint8.
        scale_out: The quantizer's output scale, 1 element; its gradient flows through `y`.
        bits: Bits of the quantizer.
        backend: The backend that has packed the codes; `auto` stands for the one that `dispatch` selects.
    """

    y: Tensor
    packed: Tensor
    scale_out: Tensor
    bits: int
    backend: str = "auto"


class QuantizedWeight(NamedTuple):
    """A convolution's weight.

    Attributes:
        quantized: `[C_out, C_in / groups, kH, kW]`, dtype of the input; not kept if the rest is given.
        weight: What was quantized by `quantize_weight`, or None for another quantizer.
        scale: `S`, `[C_out, 1, 1, 1]`.
        bits: Bits of `quantize_weight`.
        straight_through: Whether the gradient of `quantize_weight` is `straight_through`, not `scaled`.
    """

    quantized: Tensor
    weight: Tensor | None = None
    scale: Tensor | None = None
    bits: int = 0
    straight_through: bool = False


class Geometry(NamedTuple):
    """The arguments of `torch.nn.functional.conv2d` behind the bias."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def packed_conv2d(
    source: PackedInput, weight: QuantizedWeight, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """Returns `conv2d(y, quantized, bias, *geometry)`; value and gradients are its, bit for bit.

    Where the float weight is given, its gradient is made here and not by `quantize_weight`, in the memory in
    which the convolution's backward pass has left that of the quantized weight.

    Args:
        source: The input and its codes.
        weight: The quantized weight, and what it was made of.
        bias: `[C_out]`, or None.
        geometry: Stride, padding, dilation, groups.
    """
    known = weight.weight is not None
    result: Tensor = _apply(
        source.y,
        source.packed,
        source.scale_out.detach(),
        source.bits,
        weight.quantized.detach() if known else weight.quantized,
        weight.weight,
        None if weight.scale is None else weight.scale.detach(),
        weight.bits,
        weight.straight_through,
        bias,
        *geometry,
        select(OP, source.y.device) if source.backend == "auto" else source.backend,
    )
    return result


def _conv2d(
    y: Tensor,
    packed: Tensor,
    scale_out: Tensor,
    bits: int,
    quantized: Tensor,
    weight: Tensor | None,
    weight_scale: Tensor | None,
    weight_bits: int,
    straight_through: bool,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str = "auto",
) -> Tensor:
    out = F.conv2d(y, quantized, bias, stride, padding, dilation, groups)
    ordered: Tensor = load(OP, y.device, backend).ordered(out, y)
    return ordered


_packed_conv2d = torch.library.custom_op("lightning_n2uq::packed_conv2d", _conv2d, mutates_args=())
_packed_conv2d.register_fake(_conv2d)


@torch.library.custom_op("lightning_n2uq::packed_conv2d_backward", mutates_args=())
def _packed_conv2d_backward(
    grad: Tensor,
    packed: Tensor,
    scale_out: Tensor,
    bits: int,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_bits: int,
    straight_through: bool,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needed: Sequence[bool],
    backend: str = "auto",
) -> list[Tensor]:
    """Returns those of `ConvGradients` that are `needed`; without a scale `weight` is quantized already."""
    kernels = load(OP, packed.device, backend)
    quantized = weight
    if weight_scale is not None:
        quantized = apply_scale(weight, weight_scale, weight_bits, dtype=grad.dtype)
    y = kernels.rebuild(packed, scale_out, bits, size, grad.dtype)
    grads = _gradients(grad, y, quantized, [stride, padding, dilation], groups, needed)
    if grads.weight is not None and weight_scale is not None:
        through = _through_scale(grads.weight, weight_scale, straight_through, weight.dtype)
        grads = grads._replace(weight=through)
    return _laid_out(grads, y, weight, kernels)


@_packed_conv2d_backward.register_fake
def _(
    grad: Tensor,
    packed: Tensor,
    scale_out: Tensor,
    bits: int,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_bits: int,
    straight_through: bool,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needed: Sequence[bool],
    backend: str = "auto",
) -> list[Tensor]:
    kernels = load(OP, packed.device, backend)
    y = kernels.empty_rebuilt(packed, size, grad.dtype)
    grads = _gradients(grad, y, weight, [stride, padding, dilation], groups, needed)
    if grads.weight is not None and weight_scale is not None:
        grads = grads._replace(weight=grads.weight.to(weight.dtype))
    return _laid_out(grads, y, weight, kernels)


def _gradients(
    grad: Tensor,
    y: Tensor,
    quantized: Tensor,
    geometry: list[Sequence[int]],
    groups: int,
    needed: Sequence[bool],
) -> ConvGradients:
    if _overruns(y, quantized, geometry[0]):
        grad, y, quantized = (t.clone(memory_format=torch.contiguous_format) for t in (grad, y, quantized))
    bias_size, output_padding = [quantized.shape[0]], [0, 0]
    grads = torch.ops.aten.convolution_backward(
        grad, y, quantized.to(grad.dtype), bias_size, *geometry, False, output_padding, groups, needed
    )
    return ConvGradients(*(g if wanted else None for g, wanted in zip(grads, needed, strict=True)))


def _overruns(y: Tensor, weight: Tensor, stride: Sequence[int]) -> bool:
    """Returns whether the gradient of the weight would write past a buffer of oneDNN's (its issue 6035).

    It does in strided 1x1 convolutions of channels-last maps with fewer channels than vectors have lanes.
    """
    strided_point = weight.shape[2:].numel() == 1 and max(stride) > 1
    return strided_point and weight.shape[1] < 16 and y.device.type == "cpu" and not y.is_contiguous()


def _through_scale(grad: Tensor, scale: Tensor, straight_through: bool, dtype: torch.dtype) -> Tensor:
    """Turns the gradient of the quantized weight into that of the weight, in place where dtypes allow."""
    return grad.to(dtype) if straight_through else through_scale(grad, scale, dtype, owned=True)


def _laid_out(grads: ConvGradients, y: Tensor, weight: Tensor, kernels: ModuleType) -> list[Tensor]:
    """Returns the gradients without None, in the memory order of the input `y` and of the weight."""
    dx, dweight, dbias = grads
    if dx is not None:
        dx = kernels.ordered(dx, y)
    if dweight is not None and dweight.stride() != weight.stride():
        dweight = torch.empty_like(weight, dtype=dweight.dtype).copy_(dweight)
    return present((dx, dweight, dbias))


conv_gradients = undispatched(_packed_conv2d_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    y, packed, scale_out, ctx.bits, quantized, weight, scale, *rest = inputs
    ctx.weight_bits, ctx.straight_through, _, *ctx.geometry, ctx.backend = rest
    ctx.size = list(y.shape)
    ctx.save_for_backward(packed, scale_out, quantized if weight is None else weight, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    packed, scale_out, weight, scale = ctx.saved_tensors
    codes, quantizer = (packed, scale_out, ctx.bits), (weight, scale, ctx.weight_bits, ctx.straight_through)
    y, _, _, _, quantized, known, _, _, _, bias, *_ = ctx.needs_input_grad
    needed = [y, quantized if scale is None else known, bias]
    found = conv_gradients(grad, *codes, *quantizer, ctx.size, *ctx.geometry, needed, ctx.backend)
    grads = ConvGradients(*restored(found, needed))
    weights = (grads.weight, None) if scale is None else (None, grads.weight)
    return grads.x, None, None, None, *weights, None, None, None, grads.bias, *[None] * 5


_apply = differentiable(_packed_conv2d, _setup_context, _backward)
