"""`quantized_conv2d`: norm, bias, PReLU, bias, quantizer and the convolution behind it, on integers.

The forward pass writes no float map: the quantizer leaves codes, one byte each, which the integer convolution
reads at once, and the same codes packed, which the backward pass turns into the map that a float convolution
would have read. Gradients are therefore those of `packed_activation` and `packed_conv2d`, by the same
operators. One operator instead of two, because codes cannot say NaN: a map with a NaN has to be convolved in
floats, and only here are both its values and the convolution known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_n2uq.ops.dispatch import load
from lightning_n2uq.ops.eager import differentiable
from lightning_n2uq.ops.formats.fused_activation import (
    ActivationGradients,
    ConvGradients,
    NormParameters,
    PReLUParameters,
    norm_parameters,
    prelu_parameters,
    present,
    restored,
)
from lightning_n2uq.ops.fused_activation import OP, chain_gradients
from lightning_n2uq.ops.fused_conv import Geometry, conv_gradients
from lightning_n2uq.ops.integer import IntegerGeometry, out_size, prepare, run_conv2d
from lightning_n2uq.ops.tables import QuantizerParameters, output_step
from lightning_n2uq.ops.uniform import THRESHOLDS, UniformParameters, quantizer_parameters
from lightning_n2uq.ops.weight import apply_scale, weight_levels


class LeveledWeight(NamedTuple):
    """A convolution's weight as integers.

    Attributes:
        weight: What the gradient belongs to, `[C_out, C_in / groups, kH, kW]`: with `bits` the float weight,
            which is quantized here as by `quantize_weight`; without, the quantized weight.
        bits: Bits of `quantize_weight`, up to 7; 0 for another quantizer.
        straight_through: Whether the gradient of `quantize_weight` is `straight_through`, not `scaled`.
        levels: The integers of another quantizer, int8.
        step: What they are multiplied by, `[C_out]`.
    """

    weight: Tensor
    bits: int = 0
    straight_through: bool = False
    levels: Tensor | None = None
    step: Tensor | None = None


def quantized_conv2d(
    x: Tensor,
    norm: NormParameters | None,
    act: PReLUParameters | None,
    quantizer: QuantizerParameters | UniformParameters,
    weight: LeveledWeight,
    bias: Tensor | None,
    geometry: Geometry,
    dtype: torch.dtype,
    backends: tuple[str, str],
) -> tuple[Tensor, Tensor]:
    """Returns `conv2d(quantizer(act(norm(x))), weight)` from exact sums of integers, and batch statistics.

    Args:
        x: `[N, C_in, H, W]`, float16, bfloat16 or float32.
        norm: The norm's parameters; None leaves the norm out.
        act: PReLU's parameters; None leaves PReLU and both biases out.
        quantizer: The quantizer's parameters.
        weight: The weight.
        bias: `[C_out]`, or None.
        geometry: Stride, padding, dilation, groups.
        dtype: The result's dtype.
        backends: What `dispatch.select` has answered for `packed_activation` and for `integer`.

    Returns:
        The convolution's result in `dtype`, in the memory order of the backend's maps; mean and biased
        variance of the batch, `[2, C_in]` float32 (`[2, 0]` without a norm), without gradient.
    """
    uniform = isinstance(quantizer, UniformParameters)
    slots = quantizer.slots() if isinstance(quantizer, UniformParameters) else tuple(quantizer)
    method, bits = (quantizer.method, quantizer.bits) if uniform else (THRESHOLDS, _bits(slots))  # type: ignore[union-attr]
    chain = *(norm or (None, None, 0.0)), *(act or (None, None, None)), *slots, method, bits
    y, _, stats, _ = _apply(x, *chain, *weight, bias, *geometry, dtype, *backends)
    return y, stats


def _bits(slots: Sequence[Tensor | None]) -> int:
    widths = slots[1]
    assert widths is not None
    return widths.numel().bit_length()


@torch.library.custom_op("lightning_n2uq::quantized_conv2d", mutates_args=())
def _quantized_conv2d(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    bias_in: Tensor | None,
    slope: Tensor | None,
    bias_out: Tensor | None,
    start: Tensor | None,
    widths: Tensor | None,
    scale_in: Tensor | None,
    scale_out: Tensor | None,
    method: str,
    bits: int,
    weight: Tensor,
    weight_bits: int,
    straight_through: bool,
    levels: Tensor | None,
    step: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
    backend: str,
    integer_backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm, act = norm_parameters((gamma, beta), eps), prelu_parameters((bias_in, slope, bias_out))
    quantizer = quantizer_parameters(method, bits, present((start, widths, scale_in, scale_out)))
    geometry = IntegerGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    kernels = load(OP, x.device, backend)
    codes, packed, stats = kernels.forward(x, norm, act, quantizer, torch.uint8)
    scale = weight.new_empty(0)
    if weight_bits > 0:
        levels, scale = weight_levels(weight, weight_bits)
        step = scale.flatten().double() / (2**weight_bits - 1)
    assert levels is not None
    assert step is not None
    if kernels.has_nan(packed):
        y, _, _ = kernels.forward(x, norm, act, quantizer, dtype)
        plain = apply_scale(weight, scale, weight_bits) if weight_bits > 0 else weight
        out = F.conv2d(y, plain.to(dtype), None if bias is None else bias.to(dtype), *geometry)
        return kernels.ordered(out, x), packed, stats, scale
    prepared = prepare(levels, (step.double() * _step_of(quantizer)).float(), geometry, integer_backend)
    shift = None if bias is None else bias.float()
    offset = quantizer.offset if isinstance(quantizer, UniformParameters) else None
    out = run_conv2d(
        codes, prepared, shift, geometry, dtype if offset is None else torch.float32, integer_backend
    )
    if offset is not None:
        out = out.add_(_of_offset(levels, step, offset, codes, geometry)).to(dtype)
    return kernels.ordered(out, x), packed, stats, scale


@_quantized_conv2d.register_fake
def _(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    bias_in: Tensor | None,
    slope: Tensor | None,
    bias_out: Tensor | None,
    start: Tensor | None,
    widths: Tensor | None,
    scale_in: Tensor | None,
    scale_out: Tensor | None,
    method: str,
    bits: int,
    weight: Tensor,
    weight_bits: int,
    straight_through: bool,
    levels: Tensor | None,
    step: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
    backend: str,
    integer_backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = load(OP, x.device, backend)
    geometry = IntegerGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    size = x.shape[0], weight.shape[0], *out_size(x.shape[2:], weight.shape[2:], geometry)
    out = kernels.empty_map(x, dtype, size)
    packed = x.new_empty(kernels.packed_shape(x, bits), dtype=torch.uint8)
    stats = x.new_empty(2, 0 if gamma is None else x.shape[1], dtype=torch.float32)
    scale = [weight.shape[0], 1, 1, 1] if weight_bits > 0 else [0]
    return (
        out,
        packed,
        stats,
        weight.new_empty(scale, dtype=torch.float32 if weight_bits > 0 else weight.dtype),
    )


def _step_of(quantizer: QuantizerParameters | UniformParameters) -> float:
    """Returns the distance of neighbouring levels of the input."""
    if isinstance(quantizer, UniformParameters):
        return quantizer.step()
    return output_step(quantizer.widths.numel()) * quantizer.scale_out.item()


def _of_offset(
    levels: Tensor, step: Tensor, offset: Tensor, codes: Tensor, geometry: IntegerGeometry
) -> Tensor:
    """Returns what an offset of the input adds, `[1, C_out, H', W']`: padding has none, so edges differ."""
    sums = levels.sum(1, keepdim=True, dtype=torch.float32)  # integers below 2^24
    ones = torch.ones(1, geometry.groups, *codes.shape[2:])
    taps = F.conv2d(ones, sums, None, *geometry)
    return (taps.double() * (step.double() * offset.double())[:, None, None]).float()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    x, gamma, beta, ctx.eps, *rest = inputs
    parameters, (ctx.method, ctx.bits), rest = rest[:7], rest[7:9], rest[9:]
    weight, ctx.weight_bits, ctx.straight_through, _, _, _, *ctx.geometry = rest[:10]
    ctx.backend = rest[11]
    _, packed, stats, scale = output
    ctx.size = list(x.shape)
    ctx.save_for_backward(x, packed, stats, weight, scale, gamma, beta, *parameters)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    x, packed, stats, weight, scale, *parameters = ctx.saved_tensors
    needs = ctx.needs_input_grad
    needed = [any(needs[:11]), needs[13], needs[18]]
    known = (
        (weight, scale, ctx.weight_bits, ctx.straight_through)
        if ctx.weight_bits
        else (weight, None, 0, False)
    )
    levels = _output_levels(ctx.method, ctx.bits, parameters[5:])
    found = conv_gradients(
        grad, packed, levels, ctx.bits, *known, ctx.size, *ctx.geometry, needed, ctx.backend
    )
    outer = ConvGradients(*restored(found, needed))
    dweight = None if outer.weight is None else outer.weight.to(weight.dtype)
    chain: list[Tensor | None] = [None] * 10
    if outer.x is not None:
        norm, act, quantizer = present(parameters[:2]), present(parameters[2:5]), present(parameters[5:])
        kept = load(OP, x.device, ctx.backend).codes_for_backward(packed)
        method = ctx.backend, ctx.method, ctx.bits
        given = chain_gradients(outer.x, x, kept, stats, norm, ctx.eps, act, quantizer, *method)
        grads = ActivationGradients(*restored(given, (p is not None for p in (x, *parameters))))  # type: ignore[arg-type]
        chain = list(grads)
    dx, dgamma, dbeta, *others = chain
    return dx, dgamma, dbeta, None, *others, None, None, dweight, *[None] * 4, outer.bias, *[None] * 7


def _output_levels(method: str, bits: int, parameters: Sequence[Tensor | None]) -> Tensor:
    """Returns what packed codes are turned back into: an output scale, or all levels."""
    if method == THRESHOLDS:
        scale_out = parameters[-1]
        assert scale_out is not None
        return scale_out
    quantizer = quantizer_parameters(method, bits, present(parameters))
    assert isinstance(quantizer, UniformParameters)
    return quantizer.tables(torch.float32).outputs


_apply = differentiable(_quantized_conv2d, _setup_context, _backward)
