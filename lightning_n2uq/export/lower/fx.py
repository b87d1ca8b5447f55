"""Networks of any structure, through torch.fx: its graph's nodes become steps one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from lightning_n2uq.export.lower.builder import Builder
from lightning_n2uq.export.lower.deferred import Deferred
from lightning_n2uq.export.lower.fx_calls import CALLS
from lightning_n2uq.export.lower.fx_shapes import BatchSize, Squeezed
from lightning_n2uq.export.lower.layers import apply, is_known, is_layer, know_torchvision


class _LayerTracer(fx.Tracer):
    """Stops at every module that `layers.apply` knows, and at torch's own and what is derived from them."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if isinstance(module, nn.Sequential):
            return False
        return is_known(module) or is_layer(module) or super().is_leaf_module(module, qualified_name)


def trace_with_fx(model: nn.Module, builder: Builder, images: Deferred) -> Deferred:
    """Walks the traced network and returns its output.

    Raises:
        ValueError: The network cannot be traced, or an operation has no deployed form.
    """
    was_training = model.training
    know_torchvision()
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
        elif node.op == "get_attr":
            values[node] = _attribute(model, str(node.target))
        else:
            values[node] = _call(node, builder, arguments, keywords)
    raise ValueError(f"model: {type(model).__name__} has no output")


def _attribute(model: nn.Module, target: str) -> torch.Tensor:
    owner, _, name = target.rpartition(".")
    value = getattr(model.get_submodule(owner), name)
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{target}: {type(value).__name__} has no deployed form, a tensor of constants has")
    return value


def _single(output: Any) -> Deferred:  # noqa: ANN401 -- whatever the network returns
    if not isinstance(output, Deferred):
        raise ValueError(f"model: returns {type(output).__name__}, allowed is one tensor of logits")
    return output


def _call(node: fx.Node, builder: Builder, arguments: Any, keywords: Any) -> Any:  # noqa: ANN401
    if _of_constants((arguments, keywords)):
        function = node.target if callable(node.target) else getattr(torch.Tensor, str(node.target))
        return function(*arguments, **keywords)
    handler = CALLS.get(node.target if callable(node.target) else str(node.target))
    if handler is None:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
        raise ValueError(f"{node.name}: operation {name} has no deployed form")
    try:
        return handler(builder, node.name, *arguments, **keywords)
    except TypeError as error:
        raise ValueError(f"{node.name}: these arguments have no deployed form ({error})") from error


def _of_constants(arguments: Any) -> bool:  # noqa: ANN401
    """Returns whether an operation works on the network's constants alone, so that it is one itself."""
    leaves: list[object] = []
    fx.node.map_aggregate(arguments, leaves.append)
    return any(isinstance(leaf, torch.Tensor) for leaf in leaves) and not any(
        isinstance(leaf, Deferred | Squeezed | BatchSize) for leaf in leaves
    )
