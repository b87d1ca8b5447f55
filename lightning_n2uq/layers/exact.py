"""Evaluation of integer-only networks: integer sums without rounding, everything else in float64.

A map is float64, a small integer times a step. A layer takes the integers of its input and of its weight,
sums their products exactly, and scales the sum; biases, norms, PReLU and the comparisons with thresholds
follow in float64. The exported network does the same with thresholds on the integers (`export/lower`),
derived in float64 too, so that its codes are these, and no order of additions and no memory layout changes
one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_n2uq.quantizers.integers import level_distance, weight_integers
from lightning_n2uq.utils.compat import convolve

EXACT_FLOAT32 = 2**24
"""Integers up to here, and sums of them, are exact in float32."""


def takes(layer: nn.Module, x: Tensor) -> bool:
    """Returns whether a layer sums integers for `x`: float64 maps in a network of another dtype."""
    return x.dtype == torch.float64 and layer.weight.dtype != torch.float64 and not layer.training


def convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Returns what a quantized convolution computes of `x` `[N, C, H, W]`, float64."""
    return _sums(layer, x, lambda codes, weight: convolve(layer, codes, weight, None))


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Returns what a quantized linear layer computes of `x` `[N, in_features]`, float64."""
    return _sums(layer, x, F.linear)


def _sums(layer: nn.Conv2d | nn.Linear, x: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    quantized = layer.activation_quantizer(x)  # type: ignore[operator]
    step = level_distance(layer.activation_quantizer, x)  # type: ignore[arg-type]
    levels = weight_integers(layer.weight_quantizer, layer.weight)  # type: ignore[arg-type]
    if step is None or levels is None:
        raise ValueError(f"layer: {type(layer).__name__} has quantizers without integers for evaluation")
    codes, weight = torch.round(quantized / step), levels.integers
    largest = weight.abs().flatten(1).sum(1, dtype=torch.int64).max() * codes.abs().max()
    exact32 = not x.is_cuda and bool(largest <= EXACT_FLOAT32)
    dtype = torch.float32 if exact32 else torch.float64
    with torch.autocast(x.device.type, enabled=False):
        sums = product(codes.to(dtype), weight.to(dtype)).double()
    sums = sums * _channels(levels.scale * step, sums)
    return sums if layer.bias is None else sums + _channels(layer.bias, sums)


def norm_act_conv(x: Tensor, norm: nn.Module | None, act: nn.Module, conv: nn.Module) -> Tensor:
    """Returns `conv(act(norm(x)))`, the layers called one by one."""
    return conv(act(x if norm is None else normed(norm, x)))  # type: ignore[no-any-return]


def in_order(layers: nn.Module, x: Tensor) -> Tensor:
    """Returns `layers(x)` of an `nn.Sequential`, its norms in float64 where the map is."""
    if layers.training:
        return layers(x)  # type: ignore[no-any-return]
    for layer in layers.children():
        x = normed(layer, x)
    return x


def normed(layer: nn.Module, x: Tensor) -> Tensor:
    """Returns `layer(x)`; a batch norm of another dtype evaluates float64 maps in float64."""
    if not (isinstance(layer, nn.BatchNorm2d) and takes(layer, x)):
        return layer(x)  # type: ignore[no-any-return]
    numbers = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    mean, variance, weight, bias = (None if n is None else n.detach().double() for n in numbers)
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, layer.eps)


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """Returns per-channel values, in float64, shaped to go with `x`, whose axis 1 they belong to."""
    values = values.detach().double()
    return values if x.dim() == 2 else values.reshape(-1, *(1,) * (x.dim() - 2))
