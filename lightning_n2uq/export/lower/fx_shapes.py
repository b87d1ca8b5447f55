"""Calls of traced networks that ask for a shape or change it: all that ends in one axis beside the batch."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from lightning_n2uq.export.lower.builder import Builder
from lightning_n2uq.export.lower.deferred import Deferred


class BatchSize:
    """The size of the batch, which no deployed network knows beforehand."""


@dataclass(frozen=True)
class Squeezed:
    """A map of `[N, C, 1, 1]` that has lost one of its last two axes, and is about to lose the other."""

    value: Deferred


def _sizes(builder: Builder, value: Deferred) -> tuple[Any, ...]:
    return (BatchSize(), *builder.shapes[value.base])


def _size(builder: Builder, name: str, value: Deferred, dim: int | None = None) -> Any:  # noqa: ANN401
    sizes = _sizes(builder, value)
    return sizes if dim is None else sizes[dim]


def _getattr(builder: Builder, name: str, value: Any, attribute: str) -> Any:  # noqa: ANN401
    if isinstance(value, Deferred) and attribute == "shape":
        return _sizes(builder, value)
    raise ValueError(f"{name}: attribute {attribute} has no deployed form, shape has")


def _getitem(builder: Builder, name: str, value: Any, index: Any) -> Any:  # noqa: ANN401
    """Of a shape: an axis. Of a map of single numbers: `[:, :, 0, 0]`."""
    if isinstance(value, tuple):
        return value[index]
    whole = slice(None)
    if index == (whole, whole, 0, 0) and builder.shapes[value.base][1:] == (1, 1):
        return builder.flatten(value, name)
    raise ValueError(f"{name}: [{index}] has no deployed form, [:, :, 0, 0] of single numbers has")


def _view(builder: Builder, name: str, value: Deferred, *shape: Any) -> Deferred:  # noqa: ANN401
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    inner = builder.shapes[value.base]
    if (
        len(sizes) == 2
        and sizes[1] in (-1, prod(inner))
        and (isinstance(sizes[0], BatchSize) or sizes[0] == -1)
    ):
        return value if len(inner) == 1 else builder.flatten(value, name)
    if len(sizes) == 1 + len(inner) and isinstance(sizes[0], BatchSize) and tuple(sizes[1:]) == inner:
        return value
    shown = ["N" if isinstance(size, BatchSize) else size for size in sizes]
    raise ValueError(f"{name}: the shape {shown} has no deployed form, flattening all but the batch has")


def _squeeze(
    builder: Builder,
    name: str,
    value: Deferred | Squeezed,
    dim: Any = None,  # noqa: ANN401
) -> Deferred | Squeezed:
    inner = value.value if isinstance(value, Squeezed) else value
    if builder.shapes[inner.base][1:] == (1, 1):
        axes = None if dim is None else [d + 4 if d < 0 else d for d in _list(dim)]
        if isinstance(value, Squeezed):
            if dim in (None, 2, -1):
                return builder.flatten(inner, name)
        elif axes is None or sorted(axes) == [2, 3]:
            return builder.flatten(inner, name)
        elif axes in ([2], [3]):
            return Squeezed(inner)
    raise ValueError(f"{name}: squeeze({'' if dim is None else dim}) has no deployed form here, that of "
                     "the last two axes of single numbers has")  # fmt: skip


def _list(dim: Any) -> list[int]:  # noqa: ANN401
    return list(dim) if isinstance(dim, tuple | list) else [dim]


SHAPE_CALLS: dict[object, Callable[..., Any]] = {
    "size": _size,
    getattr: _getattr,
    operator.getitem: _getitem,
    **dict.fromkeys(("view", "reshape", torch.reshape), _view),
    **dict.fromkeys(("squeeze", torch.squeeze), _squeeze),
}
