"""`packed_conv2d` and `quantize_weight` by Triton, as operators on channels-last maps.

Arguments are those of the operators of the same name in `packed_conv` and `weight`, which choose; so are
gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_n2uq.ops import reference
from lightning_n2uq.ops.kernels import packed_cuda, weight_cuda
from lightning_n2uq.ops.kernels.channels_cuda import channels_last, empty_map
from lightning_n2uq.ops.layout import channels_outermost
from lightning_n2uq.ops.packed_format import output_table
from lightning_n2uq.ops.tables import compute_dtype


def _empty_weight(weight: Tensor) -> Tensor:
    quantized = torch.empty_like(weight)
    if channels_outermost(quantized):
        return quantized
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _scaled(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The quantized weight for a scale, in the layout of the weight; strided weights become contiguous."""
    quantized, source = _empty_weight(weight), weight.detach()
    if source.stride() != quantized.stride():
        source = torch.empty_like(quantized).copy_(source)
    weight_cuda.forward(source, scale.reshape(-1), bits, quantized)
    return quantized


@torch.library.custom_op("lightning_n2uq::quantize_weight_triton", mutates_args=())
def quantize_weight(weight: Tensor, bits: int, straight_through: bool) -> tuple[Tensor, Tensor]:
    """The quantized weight and its scale `[C, 1, ..]`."""
    scale = reference.weight_scale(weight, bits)
    return _scaled(weight, scale, bits), scale


@quantize_weight.register_fake
def _(weight: Tensor, bits: int, straight_through: bool) -> tuple[Tensor, Tensor]:
    shape = (weight.shape[0],) + (1,) * (weight.dim() - 1)
    return _empty_weight(weight), weight.new_empty(shape, dtype=compute_dtype(weight.dtype))


def _keep_scale(ctx: Any, inputs: tuple[Tensor, int, bool], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    ctx.dtype, ctx.straight_through = inputs[0].dtype, inputs[2]
    ctx.save_for_backward(output[1])


def _weight_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
    (scale,) = ctx.saved_tensors
    return through_scale(grad, scale, ctx.straight_through, ctx.dtype), None, None


def through_scale(grad: Tensor, scale: Tensor, straight_through: bool, dtype: torch.dtype) -> Tensor:
    """The gradient of a weight from that of the quantized weight."""
    if straight_through:
        return grad.to(dtype)
    return (grad.to(scale.dtype) / torch.where(scale == 0, 1.0, scale)).to(dtype)


quantize_weight.register_autograd(_weight_backward, setup_context=_keep_scale)


@torch.library.custom_op("lightning_n2uq::packed_conv2d_triton", mutates_args=())
def packed_conv2d(
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
    """`conv2d(y, quantized)`, channels-last."""
    return channels_last(F.conv2d(y, quantized, bias, stride, padding, dilation, groups))


@packed_conv2d.register_fake
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
    out = F.conv2d(y, quantized, bias, stride, padding, dilation, groups)
    return empty_map(out, out.dtype)


@torch.library.custom_op("lightning_n2uq::packed_conv2d_triton_backward", mutates_args=())
def packed_conv2d_backward(
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
    quantized = weight if weight_scale is None else _scaled(weight, weight_scale, weight_bits)
    y = packed_cuda.rebuild(packed, output_table(scale_out, bits), size, grad.dtype)
    grads = torch.ops.aten.convolution_backward(
        grad, y, quantized.to(grad.dtype), [weight.shape[0]], stride, padding, dilation, False, [0, 0],
        groups, needed,
    )  # fmt: skip
    result = []
    if needed[0]:
        result.append(channels_last(grads[0]))
    if needed[1]:
        dweight = grads[1]
        if weight_scale is not None:
            dweight = through_scale(dweight, weight_scale, straight_through, weight.dtype)
        result.append(torch.empty_like(weight, dtype=dweight.dtype).copy_(dweight))
    if needed[2]:
        result.append(grads[2])
    return result


@packed_conv2d_backward.register_fake
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
    dy = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    dweight = torch.empty_like(weight, dtype=grad.dtype if weight_scale is None else weight.dtype)
    grads = dy, dweight, grad.new_empty(weight.shape[0])
    return [g for g, wanted in zip(grads, needed, strict=True) if wanted]


def _keep_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    y, packed, scale_out, ctx.bits, quantized, weight, scale, *rest = inputs
    ctx.weight_bits, ctx.straight_through, _, *ctx.geometry = rest
    ctx.size = list(y.shape)
    ctx.save_for_backward(packed, scale_out, quantized if weight is None else weight, scale)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    packed, scale_out, weight, scale = ctx.saved_tensors
    known = scale is not None
    needed = [ctx.needs_input_grad[place] for place in (0, 5 if known else 4, 9)]
    codes, weights = (packed, scale_out, ctx.bits), (weight, scale, ctx.weight_bits, ctx.straight_through)
    grads = iter(packed_conv2d_backward(grad, *codes, *weights, ctx.size, *ctx.geometry, needed))
    dy, dweight, dbias = (next(grads) if wanted else None for wanted in needed)
    dweights = (None, dweight) if known else (dweight, None)
    return dy, None, None, None, *dweights, None, None, None, dbias, None, None, None, None


packed_conv2d.register_autograd(_conv_backward, setup_context=_keep_conv)
