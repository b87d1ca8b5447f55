"""How each kind of layer becomes steps.

`apply` chooses by the layer's class. To add a kind: write a function of (layer, builder, value, name) that
returns the new value, and register it.
"""

from __future__ import annotations

from functools import singledispatch

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.lower.builder import Builder, to_float64
from lightning_n2uq.export.lower.deferred import Bend, Lazy, Limit
from lightning_n2uq.layers import BiasedPReLU, QuantConv2d, QuantLinear


@singledispatch
def apply(layer: nn.Module, builder: Builder, value: Lazy, name: str) -> Lazy:
    """Adds the steps of `layer`, called `name`, and returns its output.

    Raises:
        ValueError: this kind of layer, or a setting of it, has no deployed form.
    """
    raise ValueError(f"{name or 'model'}: {type(layer).__name__} has no deployed form")


def is_known(layer: nn.Module) -> bool:
    """Whether `apply` has an entry for this kind of layer."""
    return apply.dispatch(type(layer)) is not apply.dispatch(nn.Module)


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """A number or a pair, as a pair."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def conv_window(conv: nn.Conv2d, name: str) -> s.Window:
    """Strides, zeros around, dilations and groups of a convolution."""
    if conv.padding_mode != "zeros" and conv.padding not in (0, (0, 0)):
        raise ValueError(f"{name}: padding_mode {conv.padding_mode!r} has no deployed form, only 'zeros' has")
    kernel, dilation = pair(conv.kernel_size), pair(conv.dilation)
    if conv.padding == "valid":
        before = after = (0, 0)
    elif conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        before = (total[0] // 2, total[1] // 2)
        after = (total[0] - before[0], total[1] - before[1])
    else:
        before = after = pair(conv.padding)  # type: ignore[arg-type]
    return s.Window(pair(conv.stride), (*before, *after), dilation, conv.groups)


@apply.register
def _(layer: QuantConv2d, builder: Builder, value: Lazy, name: str) -> Lazy:
    return builder.quantized_layer(value, layer, name, conv_window(layer, name))


@apply.register
def _(layer: QuantLinear, builder: Builder, value: Lazy, name: str) -> Lazy:
    return builder.quantized_layer(value, layer, name, None)


@apply.register
def _(layer: nn.Conv2d, builder: Builder, value: Lazy, name: str) -> Lazy:
    return builder.float_layer(value, layer.weight, layer.bias, name, conv_window(layer, name))


@apply.register
def _(layer: nn.Linear, builder: Builder, value: Lazy, name: str) -> Lazy:
    return builder.float_layer(value, layer.weight, layer.bias, name, None)


@apply.register
def _(layer: _BatchNorm, builder: Builder, value: Lazy, name: str) -> Lazy:
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError(f"{name}: a batch norm without running statistics has no deployed form")
    scale = 1.0 / np.sqrt(to_float64(layer.running_var) + layer.eps)
    shift = -to_float64(layer.running_mean) * scale
    if layer.affine:
        weight = to_float64(layer.weight)
        scale, shift = scale * weight, shift * weight + to_float64(layer.bias)
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        raise ValueError(f"{name}: its statistics are not finite; nothing can be exported from this network")
    return value.linear(scale, shift)


@apply.register
def _(layer: BiasedPReLU, builder: Builder, value: Lazy, name: str) -> Lazy:
    bent = value.linear(shift=to_float64(layer.bias_in)).then(Bend(to_float64(layer.slope)))
    return bent.linear(shift=to_float64(layer.bias_out))


@apply.register
def _(layer: nn.PReLU, builder: Builder, value: Lazy, name: str) -> Lazy:
    slope = to_float64(layer.weight)
    return value.then(Bend(np.array(np.broadcast_to(slope, (value.channels,)))))


@apply.register
def _(layer: nn.LeakyReLU, builder: Builder, value: Lazy, name: str) -> Lazy:
    return value.then(Bend(np.full(value.channels, float(layer.negative_slope))))


@apply.register
def _(layer: nn.ReLU, builder: Builder, value: Lazy, name: str) -> Lazy:
    return value.then(Limit(0.0, float("inf")))


@apply.register
def _(layer: nn.Hardtanh, builder: Builder, value: Lazy, name: str) -> Lazy:  # also ReLU6
    return value.then(Limit(float(layer.min_val), float(layer.max_val)))


@apply.register
def _(layer: nn.Hardsigmoid, builder: Builder, value: Lazy, name: str) -> Lazy:
    return value.linear(1.0 / 6.0, 0.5).then(Limit(0.0, 1.0))


@apply.register
def _(layer: nn.Hardswish, builder: Builder, value: Lazy, name: str) -> Lazy:
    gate = value.linear(1.0 / 6.0, 0.5).then(Limit(0.0, 1.0))
    return builder.multiply(value, gate, name)


@apply.register(nn.Identity)
@apply.register(nn.Dropout)
@apply.register(nn.Dropout2d)
def _(layer: nn.Module, builder: Builder, value: Lazy, name: str) -> Lazy:
    return value


@apply.register
def _(layer: nn.MaxPool2d, builder: Builder, value: Lazy, name: str) -> Lazy:
    source, kernel = builder.value(value), pair(layer.kernel_size)
    stride, dilation, before = pair(layer.stride), pair(layer.dilation), pair(layer.padding)
    after = before
    if layer.ceil_mode:
        sizes = zip(builder.shapes[source][1:], kernel, stride, dilation, before, strict=True)
        bottom, right = (place[-1] + _ceil_padding(*place) for place in sizes)
        after = (bottom, right)
    window = s.Window(stride, (*before, *after), dilation)
    return builder.lazy(s.MaxPool(name, (source,), kernel, window))


def _ceil_padding(size: int, kernel: int, stride: int, dilation: int, padding: int) -> int:
    """How much farther a last, incomplete window reaches; one that starts outside is left out."""
    span = dilation * (kernel - 1) + 1
    places = -(-(size + 2 * padding - span) // stride) + 1
    if (places - 1) * stride >= size + padding:
        places -= 1
    return max((places - 1) * stride + span - (size + 2 * padding), 0)


@apply.register
def _(layer: nn.AdaptiveAvgPool2d, builder: Builder, value: Lazy, name: str) -> Lazy:
    source = builder.value(value)
    if layer.output_size in (builder.shapes[source][1], builder.shapes[source][1:]):
        return value
    return _global_mean(layer.output_size, builder, value, name)


@apply.register
def _(layer: nn.AvgPool2d, builder: Builder, value: Lazy, name: str) -> Lazy:
    kernel, padding = pair(layer.kernel_size), pair(layer.padding)
    if layer.ceil_mode or layer.divisor_override or (any(padding) and not layer.count_include_pad):
        raise ValueError(f"{name}: only averages over whole, equally weighted windows have a deployed form")
    places = kernel[0] * kernel[1]
    weight = torch.full((value.channels, 1, *kernel), 1 / places, dtype=torch.float64)
    window = s.Window(pair(layer.stride), (*padding, *padding), (1, 1), value.channels)
    return builder.float_layer(value, weight, None, name, window)


def _global_mean(size: object, builder: Builder, value: Lazy, name: str) -> Lazy:
    if size not in (1, (1, 1)):
        raise ValueError(f"{name}: averaging to {size} has no deployed form, averaging to 1 has")
    return builder.lazy(s.MeanPool(name, (builder.value(value),)))


@apply.register
def _(layer: nn.Flatten, builder: Builder, value: Lazy, name: str) -> Lazy:
    if layer.start_dim != 1 or layer.end_dim != -1:
        raise ValueError(f"{name}: only flattening of everything but the batch has a deployed form")
    return builder.flatten(value, name)


@apply.register
def _(layer: nn.Sequential, builder: Builder, value: Lazy, name: str) -> Lazy:
    for child_name, child in layer.named_children():
        value = apply(child, builder, value, join(name, child_name))
    return value


def join(*names: str) -> str:
    """A dotted path from the parts that are not empty."""
    return ".".join(name for name in names if name)


__all__ = ["apply", "conv_window", "is_known", "join", "pair"]
