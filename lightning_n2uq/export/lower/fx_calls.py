"""What torch.fx finds between layers: functions, operators and methods of tensors, as steps."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.lower.builder import Builder, check_finite, to_float64
from lightning_n2uq.export.lower.deferred import Deferred, Float64
from lightning_n2uq.export.lower.fx_shapes import SHAPE_CALLS
from lightning_n2uq.export.lower.layers import apply

Handler = Callable[..., Any]
Constant = float | Tensor


def _as_layer(kind: Callable[..., nn.Module]) -> Handler:
    """A function that does what a layer without parameters does."""

    def handler(builder: Builder, name: str, value: Deferred, *arguments: Any, **keywords: Any) -> Deferred:  # noqa: ANN401
        for key in ("inplace", "training"):
            keywords.pop(key, None)
        return apply(kind(*arguments, **keywords), builder, value, name)

    return handler


def _constant(name: str, number: Constant, value: Deferred, builder: Builder) -> Float64 | float:
    """Returns a number, or a tensor of one number or one per channel, as what `Deferred.affine` takes."""
    if not isinstance(number, Tensor):
        return float(number)
    constant = to_float64(number)
    check_finite(name, "constants", constant)
    if len(constant) == 1:
        return float(constant[0])
    inner = len(builder.shapes[value.base])
    shape = tuple(number.shape)[-inner:]
    per_channel = shape == (value.channels, *[1] * (inner - 1)) and number.numel() == value.channels
    if not per_channel:
        raise ValueError(
            f"{name}: constants of shape {tuple(number.shape)} have no deployed form, only one number or one "
            f"per channel {(value.channels, *[1] * (inner - 1))} has"
        )
    return constant


def _add(
    builder: Builder, name: str, left: Deferred | Constant, right: Deferred | Constant, alpha: float = 1
) -> Deferred:
    if isinstance(right, Deferred) and isinstance(left, Deferred):
        return builder.add(left, right if alpha == 1 else right.affine(float(alpha)), name)
    if isinstance(left, Deferred):
        assert not isinstance(right, Deferred)
        return left.affine(shift=alpha * _constant(name, right, left, builder))
    assert isinstance(right, Deferred)
    return right.affine(float(alpha), _constant(name, left, right, builder))


def _sub(
    builder: Builder, name: str, left: Deferred | Constant, right: Deferred | Constant, alpha: float = 1
) -> Deferred:
    return _add(builder, name, left, right, -alpha)


def _mul(builder: Builder, name: str, left: Deferred | Constant, right: Deferred | Constant) -> Deferred:
    if isinstance(right, Deferred) and isinstance(left, Deferred):
        return builder.multiply(left, right, name)
    number, value = (right, left) if isinstance(left, Deferred) else (left, right)
    assert isinstance(value, Deferred)
    assert not isinstance(number, Deferred)
    return value.affine(_constant(name, number, value, builder))


def _div(builder: Builder, name: str, left: Deferred, right: Constant) -> Deferred:
    if not isinstance(left, Deferred) or isinstance(right, Deferred):
        raise ValueError(f"{name}: division by a value has no deployed form, division by constants has")
    with np.errstate(divide="ignore"):
        scale = 1.0 / np.asarray(_constant(name, right, left, builder))
    check_finite(name, "reciprocals of constants", scale)
    return left.affine(scale)


def _neg(builder: Builder, name: str, value: Deferred) -> Deferred:
    return value.affine(-1.0)


def _flatten(builder: Builder, name: str, value: Deferred, start_dim: int = 0, end_dim: int = -1) -> Deferred:
    return apply(nn.Flatten(start_dim, end_dim), builder, value, name)


def _mean(builder: Builder, name: str, value: Deferred, dim: Any, keepdim: bool = False) -> Deferred:  # noqa: ANN401
    if sorted(dim if isinstance(dim, list | tuple) else [dim]) not in ([2, 3], [-2, -1]):
        raise ValueError(f"{name}: mean over {dim} has no deployed form, only height and width have")
    pooled = apply(nn.AdaptiveAvgPool2d(1), builder, value, name)
    return pooled if keepdim else builder.flatten(pooled, f"{name}.flatten")


def _concat(builder: Builder, name: str, values: list[Deferred], dim: int = 0) -> Deferred:
    if dim != 1:
        raise ValueError(f"{name}: concatenation along {dim} has no deployed form, only along channels has")
    return builder.output(s.Concat(name, tuple(builder.value(value) for value in values)))


def _unchanged(builder: Builder, name: str, value: Deferred, *_: Any, **__: Any) -> Deferred:  # noqa: ANN401
    return value


CALLS: dict[object, Handler] = {
    **SHAPE_CALLS,
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), _sub),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), _div),
    **dict.fromkeys((operator.neg, torch.neg, "neg"), _neg),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), _mul),
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys((torch.cat, torch.concat), _concat),
    **dict.fromkeys((F.relu, torch.relu, "relu", "relu_"), _as_layer(nn.ReLU)),
    **dict.fromkeys((F.dropout, F.dropout2d), _unchanged),
    "contiguous": _unchanged,
    F.relu6: _as_layer(nn.ReLU6),
    F.hardtanh: _as_layer(nn.Hardtanh),
    F.hardswish: _as_layer(nn.Hardswish),
    F.hardsigmoid: _as_layer(nn.Hardsigmoid),
    F.leaky_relu: _as_layer(nn.LeakyReLU),
    F.max_pool2d: _as_layer(nn.MaxPool2d),
    torch.max_pool2d: _as_layer(nn.MaxPool2d),
    F.avg_pool2d: _as_layer(nn.AvgPool2d),
    F.adaptive_avg_pool2d: _as_layer(nn.AdaptiveAvgPool2d),
}
"""Functions, and methods by name, with what makes steps of them: `(builder, name, *arguments)`."""
