"""`packed_conv2d`: a convolution that keeps packed codes and its float weight, both of which cost no floats.

Plain autograd would keep the quantized input and the quantized weight. Here the backward pass rebuilds the
input from its codes and quantizes the weight again by the scale of the forward pass: the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_n2uq.ops.eager import differentiable, undispatched
from lightning_n2uq.ops.formats.fused_activation import output_table
from lightning_n2uq.ops.fused_activation import kernel, kernels_of
from lightning_n2uq.ops.weight import apply_scale, through_scale


class PackedInput(NamedTuple):
    """A convolution's input.

    Attributes:
        y: `[N, C_in, H, W]`, from `packed_activation`; not kept.
        packed: its packed codes, uint8.
        scale_out: the quantizer's output scale, 1 element; its gradient flows through `y`.
        bits: of the quantizer.
    """

    y: Tensor
    packed: Tensor
    scale_out: Tensor
    bits: int


class QuantizedWeight(NamedTuple):
    """A convolution's weight.

    Attributes:
        quantized: `[C_out, C_in / groups, kH, kW]`, dtype of the input; not kept if the rest is given.
        weight: what was quantized by `quantize_weight`, or None for another quantizer.
        scale: `S` `[C_out, 1, 1, 1]`.
        bits: of `quantize_weight`.
        straight_through: whether the gradient of `quantize_weight` is `straight_through`, not `scaled`.
    """

    quantized: Tensor
    weight: Tensor | None = None
    scale: Tensor | None = None
    bits: int = 0
    straight_through: bool = False


class Geometry(NamedTuple):
    """Arguments of `torch.nn.functional.conv2d` behind the bias."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def packed_conv2d(
    source: PackedInput, weight: QuantizedWeight, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """`conv2d(y, quantized, bias, *geometry)`; value and gradients are its, bit for bit.

    Where the float weight is given, its gradient is made here and not by `quantize_weight`, in the memory in
    which the convolution's backward pass has left that of the quantized weight.
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
    )
    return result


@torch.library.custom_op("lightning_n2uq::packed_conv2d", mutates_args=())
def _packed_conv2d(
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
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    return _ordered(F.conv2d(y, quantized, bias, stride, padding, dilation, groups), packed)


@_packed_conv2d.register_fake
def _(
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
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    return _ordered(F.conv2d(y, quantized, bias, stride, padding, dilation, groups), packed)


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
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needed: list[bool],
) -> list[Tensor]:
    """Those gradients of input, weight and bias that are `needed`; without a scale, `weight` is quantized."""
    quantized = weight if weight_scale is None else apply_scale(weight, weight_scale, weight_bits)
    triton = kernels_of(packed)
    if triton is not None:
        y = triton.rebuild(packed, 2**bits - 1, size, grad.dtype)
    else:
        table = output_table(scale_out, bits)
        y = kernel(packed).rebuild(packed, table, size[2] * size[3]).reshape(size).to(grad.dtype)
    geometry = [stride, padding, dilation]
    grads = _gradients(grad, y, quantized.to(grad.dtype), geometry, groups, needed)
    place = int(needed[0])
    if weight_scale is not None and needed[1]:
        grads[place] = _through_scale(grads[place], weight_scale, straight_through, weight.dtype)
    if needed[0]:
        grads[0] = _ordered(grads[0], packed)
    if triton is not None and needed[1] and grads[place].stride() != weight.stride():
        grads[place] = torch.empty_like(weight, dtype=grads[place].dtype).copy_(grads[place])
    return grads


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
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needed: list[bool],
) -> list[Tensor]:
    if kernels_of(packed) is not None:
        dy = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        dweight = torch.empty_like(weight, dtype=grad.dtype if weight_scale is None else weight.dtype)
        known = dy, dweight, grad.new_empty(weight.shape[0])
        return [g for g, wanted in zip(known, needed, strict=True) if wanted]
    y = grad.new_empty(size)
    grads = _gradients(grad, y, weight.to(grad.dtype), [stride, padding, dilation], groups, needed)
    if weight_scale is not None and needed[1]:
        grads[int(needed[0])] = torch.empty_like(grads[int(needed[0])], dtype=weight.dtype)
    return grads


def _ordered(x: Tensor, packed: Tensor) -> Tensor:
    """Channels-last where Triton's kernels are at work, whatever the convolution has chosen."""
    return x if kernels_of(packed) is None else x.contiguous(memory_format=torch.channels_last)


def _gradients(
    grad: Tensor, y: Tensor, weight: Tensor, geometry: list[list[int]], groups: int, needed: list[bool]
) -> list[Tensor]:
    grads = torch.ops.aten.convolution_backward(
        grad, y, weight, [weight.shape[0]], *geometry, False, [0, 0], groups, needed
    )
    return [g for g, wanted in zip(grads, needed, strict=True) if wanted]


def _through_scale(grad: Tensor, scale: Tensor, straight_through: bool, dtype: torch.dtype) -> Tensor:
    """Turns the gradient of the quantized weight into that of the weight, in place where dtypes allow."""
    return grad.to(dtype) if straight_through else through_scale(grad, scale, dtype, owned=True)


_gradients_of = undispatched(_packed_conv2d_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    y, packed, scale_out, ctx.bits, quantized, weight, scale, *rest = inputs
    ctx.weight_bits, ctx.straight_through, _, *ctx.geometry = rest
    ctx.size = list(y.shape)
    ctx.save_for_backward(packed, scale_out, quantized if weight is None else weight, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    packed, scale_out, weight, scale = ctx.saved_tensors
    known = scale is not None
    needed = [ctx.needs_input_grad[place] for place in (0, 5 if known else 4, 9)]
    *geometry, groups = ctx.geometry
    grads = iter(
        _gradients_of(
            grad,
            packed,
            scale_out,
            ctx.bits,
            weight,
            scale,
            ctx.weight_bits,
            ctx.straight_through,
            ctx.size,
            *geometry,
            groups,
            needed,
        )
    )
    dy, dweight, dbias = (next(grads) if wanted else None for wanted in needed)
    dweights = (None, dweight) if known else (dweight, None)
    return dy, None, None, None, *dweights, None, None, None, dbias, None, None, None, None


_apply = differentiable(_packed_conv2d, _setup_context, _backward)
