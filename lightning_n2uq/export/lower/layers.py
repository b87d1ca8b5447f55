"""How each kind of layer becomes steps.

To add a kind: write a function of (layer, builder, value, name) that returns the new value, and register it
with `lower`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.integer_steps import IntMaxPool
from lightning_n2uq.export.lower.builder import Builder, check_finite, to_float64
from lightning_n2uq.export.lower.deferred import Deferred
from lightning_n2uq.export.lower.grids import of_codes, on_a_grid, on_grid, sum_pool
from lightning_n2uq.export.lower.quantized import float_layer, quantized_layer
from lightning_n2uq.layers import BiasedPReLU, QuantConv2d, QuantLinear
from lightning_n2uq.quantizers import UniformGrid
from lightning_n2uq.utils.compat import BatchNorm


def apply(layer: nn.Module, builder: Builder, value: Deferred, name: str) -> Deferred:
    """Adds the steps of `layer`, called `name`, and returns its output.

    Raises:
        ValueError: This kind of layer, or a setting of it, has no deployed form.
    """
    if not is_known(layer):
        raise ValueError(f"{name or 'model'}: {type(layer).__name__} has no deployed form")
    return lower(layer, builder, value, name)


@singledispatch
def lower(layer: nn.Module, builder: Builder, value: Deferred, name: str) -> Deferred:
    """Does what `apply` does; chosen by the layer's class."""
    raise NotImplementedError


def is_known(layer: nn.Module) -> bool:
    """Returns whether `lower` has an entry for this kind of layer that a subclass has not overridden."""
    kind: type[Any] = next((kind for kind in type(layer).__mro__ if kind in lower.registry), object)
    if kind is object:
        return False
    # The entry of batch norms knows timm's, which has an activation inside.
    return type(layer).forward is kind.forward or type(layer).__name__ == "BatchNormAct2d"


def is_layer(layer: nn.Module) -> bool:
    """Returns whether `lower` has an entry for one of torch's classes that this one is derived from."""
    kinds = [kind for kind in type(layer).__mro__ if kind in lower.registry and kind is not nn.Sequential]
    return any(kind.__module__.startswith("torch.nn") for kind in kinds)


def pair(value: Any) -> tuple[int, int]:  # noqa: ANN401 -- what torch takes as a size
    """Returns a number or a pair as a pair."""
    return (value[0], value[1]) if isinstance(value, tuple | list) else (value, value)


def conv_window(conv: nn.Conv2d, name: str) -> s.Window:
    """Returns strides, padding, dilations and groups of a convolution."""
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
        before = after = pair(conv.padding)
    return s.Window(pair(conv.stride), (*before, *after), dilation, conv.groups)


@lower.register(QuantConv2d)
@lower.register(QuantLinear)
def _(layer: QuantConv2d | QuantLinear, builder: Builder, value: Deferred, name: str) -> Deferred:
    window = conv_window(layer, name) if isinstance(layer, QuantConv2d) else None
    return quantized_layer(builder, value, layer, name, window)


@lower.register(nn.Conv2d)
@lower.register(nn.Linear)
def _(layer: nn.Conv2d | nn.Linear, builder: Builder, value: Deferred, name: str) -> Deferred:
    window = conv_window(layer, name) if isinstance(layer, nn.Conv2d) else None
    return float_layer(builder, value, layer.weight, layer.bias, name, window)


@lower.register(BatchNorm)
def _(layer: nn.BatchNorm2d, builder: Builder, value: Deferred, name: str) -> Deferred:
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError(f"{name}: a batch norm without running statistics has no deployed form")
    scale = 1.0 / np.sqrt(to_float64(layer.running_var) + layer.eps)
    shift = -to_float64(layer.running_mean) * scale
    if layer.affine:
        weight = to_float64(layer.weight)
        scale, shift = scale * weight, shift * weight + to_float64(layer.bias)
    check_finite(name, "statistics", scale, shift)
    return _children(layer, builder, value.affine(scale, shift), name)


def _children(layer: nn.Module, builder: Builder, value: Deferred, name: str) -> Deferred:
    for child_name, child in layer.named_children():
        value = apply(child, builder, value, join(name, child_name))
    return value


@lower.register
def _(layer: UniformGrid, builder: Builder, value: Deferred, name: str) -> Deferred:
    return on_a_grid(builder, value, layer, name)


@lower.register
def _(layer: BiasedPReLU, builder: Builder, value: Deferred, name: str) -> Deferred:
    bent = value.affine(shift=to_float64(layer.bias_in)).prelu(to_float64(layer.slopes()))
    return bent.affine(shift=to_float64(layer.bias_out))


@lower.register
def _(layer: nn.Hardswish, builder: Builder, value: Deferred, name: str) -> Deferred:
    return builder.multiply(value, _hard_sigmoid(value), name)


def _hard_sigmoid(value: Deferred) -> Deferred:
    return value.affine(1.0 / 6.0, 0.5).clamp(0.0, 1.0)


def _register_map(kind: type[nn.Module], change: Callable[[Any, Deferred], Deferred]) -> None:
    """Registers a layer that works value by value."""
    lower.register(kind, lambda layer, builder, value, name: change(layer, value))


_register_map(nn.PReLU, lambda layer, value: value.prelu(to_float64(layer.weight)))
_register_map(nn.LeakyReLU, lambda layer, value: value.prelu(float(layer.negative_slope)))
_register_map(nn.ReLU, lambda layer, value: value.clamp(0.0, float("inf")))
# Also ReLU6.
_register_map(nn.Hardtanh, lambda layer, value: value.clamp(float(layer.min_val), float(layer.max_val)))
_register_map(nn.Hardsigmoid, lambda layer, value: _hard_sigmoid(value))
for identity in (nn.Identity, nn.Dropout, nn.Dropout2d):
    _register_map(identity, lambda layer, value: value)


@lower.register
def _(layer: nn.MaxPool2d, builder: Builder, value: Deferred, name: str) -> Deferred:
    integers = of_codes(builder, value)
    source, kernel = value.base if integers else builder.value(value), pair(layer.kernel_size)
    stride, dilation, before = pair(layer.stride), pair(layer.dilation), pair(layer.padding)
    after = before
    if layer.ceil_mode:
        sizes = zip(builder.shapes[source][1:], kernel, stride, dilation, before, strict=True)
        bottom, right = (place[-1] + _ceil_padding(*place) for place in sizes)
        after = (bottom, right)
    window = s.Window(stride, (*before, *after), dilation)
    if integers:
        return replace(value, base=builder.place(IntMaxPool(name, (source,), kernel, window)))
    return builder.output(s.MaxPool(name, (source,), kernel, window))


def _ceil_padding(size: int, kernel: int, stride: int, dilation: int, padding: int) -> int:
    """How much farther a last, incomplete window reaches; one that starts outside is left out."""
    span = dilation * (kernel - 1) + 1
    places = -(-(size + 2 * padding - span) // stride) + 1
    if (places - 1) * stride >= size + padding:
        places -= 1
    return max((places - 1) * stride + span - (size + 2 * padding), 0)


@lower.register
def _(layer: nn.AdaptiveAvgPool2d, builder: Builder, value: Deferred, name: str) -> Deferred:
    size = pair(layer.output_size)
    if size == (1, 1) and on_grid(builder, value):
        return sum_pool(builder, value, name)
    source = builder.value(value)
    if size == builder.shapes[source][1:]:
        return value
    if size != (1, 1):
        raise ValueError(f"{name}: averaging to {layer.output_size} has no deployed form, averaging to 1 has")
    return builder.output(s.MeanPool(name, (source,)))


@lower.register
def _(layer: nn.AvgPool2d, builder: Builder, value: Deferred, name: str) -> Deferred:
    kernel, padding = pair(layer.kernel_size), pair(layer.padding)
    if layer.ceil_mode or layer.divisor_override or (any(padding) and not layer.count_include_pad):
        raise ValueError(f"{name}: only averages over whole, equally weighted windows have a deployed form")
    places = kernel[0] * kernel[1]
    weight = torch.full((value.channels, 1, *kernel), 1 / places, dtype=torch.float64)
    window = s.Window(pair(layer.stride), (*padding, *padding), (1, 1), value.channels)
    return float_layer(builder, value, weight, None, name, window)


@lower.register
def _(layer: nn.Flatten, builder: Builder, value: Deferred, name: str) -> Deferred:
    if layer.start_dim != 1 or layer.end_dim != -1:
        raise ValueError(f"{name}: only flattening of everything but the batch has a deployed form")
    return builder.flatten(value, name)


@lower.register
def _(layer: nn.Sequential, builder: Builder, value: Deferred, name: str) -> Deferred:
    return _children(layer, builder, value, name)


def know_torchvision() -> None:
    """Registers torchvision's `Normalize`, where a network's code has imported it."""
    for module in ("torchvision.transforms.transforms", "torchvision.transforms.v2"):
        kind = getattr(sys.modules.get(module), "Normalize", None)
        if kind is not None and kind not in lower.registry:
            lower.register(kind, _normalize)


def _normalize(layer: Any, builder: Builder, value: Deferred, name: str) -> Deferred:  # noqa: ANN401
    mean, std = (np.array(values, np.float64) for values in (layer.mean, layer.std))
    return value.affine(1.0 / std, -mean / std)


def join(*names: str) -> str:
    """Returns a dotted path of the parts that are not empty."""
    return ".".join(name for name in names if name)
