"""Networks of any structure, through torch.fx: its graph's nodes become steps one by one."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.lower.builder import Builder
from lightning_n2uq.export.lower.deferred import Deferred
from lightning_n2uq.export.lower.layers import apply, is_known

Handler = Callable[..., Deferred]


class _LayerTracer(fx.Tracer):
    """Stops at every module that `layers.apply` knows, and at torch's own."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if isinstance(module, nn.Sequential):
            return False
        return is_known(module) or super().is_leaf_module(module, qualified_name)


def trace_with_fx(model: nn.Module, builder: Builder, images: Deferred) -> Deferred:
    """Walks the traced network and returns its output.

    Raises:
        ValueError: The network cannot be traced, or an operation has no deployed form.
    """
    was_training = model.training
    try:
        graph = _LayerTracer().trace(model.eval())
    except Exception as error:  # tracing runs the network's own code, which may raise anything
        reason = str(error).partition("\n")[0]
        raise ValueError(f"model: {type(model).__name__} cannot be traced by torch.fx ({reason})") from error
    finally:
        model.train(was_training)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        arguments = fx.node.map_arg(node.args, lambda n: values[n])
        keywords = fx.node.map_arg(node.kwargs, lambda n: values[n])
        if node.op == "placeholder":
            values[node] = images
        elif node.op == "output":
            return _single(arguments[0])
        elif node.op == "call_module":
            values[node] = apply(
                model.get_submodule(str(node.target)), builder, arguments[0], str(node.target)
            )
        else:
            values[node] = _call(node, builder, arguments, keywords)
    raise ValueError(f"model: {type(model).__name__} has no output")


def _single(output: Any) -> Deferred:  # noqa: ANN401 -- whatever the network returns
    if not isinstance(output, Deferred):
        raise ValueError(f"model: returns {type(output).__name__}, allowed is one tensor of logits")
    return output


def _call(node: fx.Node, builder: Builder, arguments: Any, keywords: Any) -> Deferred:  # noqa: ANN401
    handler = _CALLS.get(node.target if callable(node.target) else str(node.target))
    if handler is None:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
        raise ValueError(f"{node.name}: operation {name} has no deployed form")
    try:
        return handler(builder, node.name, *arguments, **keywords)
    except TypeError as error:
        raise ValueError(f"{node.name}: these arguments have no deployed form ({error})") from error


def _as_layer(kind: Callable[..., nn.Module]) -> Handler:
    """A function that does what a layer without parameters does."""

    def handler(builder: Builder, name: str, value: Deferred, *arguments: Any, **keywords: Any) -> Deferred:  # noqa: ANN401
        for key in ("inplace", "training"):
            keywords.pop(key, None)
        return apply(kind(*arguments, **keywords), builder, value, name)

    return handler


def _add(builder: Builder, name: str, left: Deferred, right: Deferred | float) -> Deferred:
    if isinstance(right, Deferred) and isinstance(left, Deferred):
        return builder.add(left, right, name)
    number, value = (right, left) if isinstance(left, Deferred) else (left, right)
    return value.affine(shift=float(number))


def _mul(builder: Builder, name: str, left: Deferred | float, right: Deferred | float) -> Deferred:
    if isinstance(right, Deferred) and isinstance(left, Deferred):
        return builder.multiply(left, right, name)
    number, value = (right, left) if isinstance(left, Deferred) else (left, right)
    return value.affine(float(number))  # type: ignore[arg-type,union-attr]


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


_CALLS: dict[object, Handler] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _add),
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
