"""The first and the last layers of a network, and their order: by execution on an example, or registration.

An example is run once, in evaluation mode. Every layer's output gets a mark in the autograd graph; from a
layer's input, the graph is followed back to the marks it came from. A layer that no other layer feeds is a
first one, a layer that feeds no other one is a last one: all heads of a detector, all branches at an entry.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_n2uq.convert.calibration import evaluating
from lightning_n2uq.quantizers.looks import looking
from lightning_n2uq.utils.compat import tree_leaves, tree_map

EXECUTION, REGISTRATION = "by execution", "by registration"


@dataclass
class Order:
    """Layers in order, with their places.

    Attributes:
        layers: The layers in the order in which they run, or are registered.
        first: Layers that take the network's input.
        last: Layers whose output no other layer takes.
        source: `by execution` or `by registration`, for the report.
    """

    layers: list[nn.Module]
    first: set[nn.Module]
    last: set[nn.Module]
    source: str


@dataclass
class Trace:
    """What running an example has shown: calls in order, and who feeds whom."""

    called: list[nn.Module] = field(default_factory=list)
    edges: set[tuple[nn.Module, nn.Module]] = field(default_factory=set)


def registered(layers: Sequence[nn.Module], weighted: Sequence[nn.Module]) -> Order:
    """Returns the order of registration; behind an embedding, which comes first itself, no layer is first.

    Args:
        layers: The convertible layers, as the network registers them.
        weighted: All modules with weights, the layers among them.
    """
    behind = bool(layers) and any(isinstance(m, nn.Embedding) for m in weighted[: weighted.index(layers[0])])
    first = set() if behind else set(layers[:1])
    return Order(list(layers), first, set(layers[-1:]), REGISTRATION)


def executed(model: nn.Module, weighted: Iterable[nn.Module], example: object) -> Trace | None:
    """Runs `example` and notes what happens; None, with a warning, where the model refuses it.

    Args:
        model: The network; modes, buffers and random numbers are as before.
        weighted: All modules with weights.
        example: The input: a tuple of positional arguments, a mapping of keywords, or one argument.
    """
    trace = Trace()
    try:
        _run(model, set(weighted), example, trace)
    except Exception as error:  # whatever a network of another library raises
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"example: {type(model).__name__} refuses it ({type(error).__name__}: {reason}), so that first "
            "and last layers are taken by order of registration",
            stacklevel=2,
        )
        return None
    return trace


def order_of(layers: Sequence[nn.Module], trace: Trace, convertible: set[nn.Module]) -> Order | None:
    """Returns the order in which an example has passed `layers`; None if it has passed none of them.

    Args:
        layers: The convertible layers of one part, as the network registers them.
        trace: What the example has shown.
        convertible: The convertible layers of all parts. Others, such as embeddings, stay in full precision:
            the layer behind one is no first layer.
    """
    own = set(layers)
    ran = [layer for layer in dict.fromkeys(trace.called) if layer in own]
    if not ran:
        return None
    inside = {(source, reader) for source, reader in trace.edges if source in own and reader in own}
    fed = {reader for _, reader in inside}
    fed |= {reader for source, reader in trace.edges if source not in convertible}
    feeding = {source for source, _ in inside}
    first, last = {x for x in ran if x not in fed}, {x for x in ran if x not in feeding}
    return Order(ran, first, last, EXECUTION)


def _run(model: nn.Module, marked: set[nn.Module], example: object, trace: Trace) -> None:
    args, kwargs = _arguments(example)
    devices = list({t.device for t in model.parameters() if t.is_cuda})
    with evaluating(model), looking(), torch.random.fork_rng(devices), ExitStack() as stack:
        for module in marked:
            stack.callback(module.register_forward_pre_hook(_reader(trace), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(_marker).remove)
        with torch.enable_grad():
            model(*args, **kwargs)


def _arguments(example: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example,), {}


class _Mark(torch.autograd.Function):
    """Copies a tensor and leaves the layer that made it in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module, anchor: Tensor) -> Tensor:  # noqa: ANN401
        ctx.layer = layer
        return x.clone()  # not the tensor itself, which layers behind may change in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return gradient, None, None


def _marker(module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ANN401
    anchor = torch.zeros((), requires_grad=True)  # marks frozen layers as well

    def mark(x: object) -> object:
        floating = isinstance(x, Tensor) and x.is_floating_point()
        return _Mark.apply(x, module, anchor) if floating else x  # type: ignore[no-untyped-call]

    return tree_map(mark, output)


def _reader(trace: Trace) -> Any:  # noqa: ANN401
    def read(module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ANN401
        sources = set(_sources(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)))
        trace.called.append(module)
        trace.edges.update((source, module) for source in sources if source is not module)

    return read


def _sources(tensors: Iterable[Tensor]) -> Iterator[nn.Module]:
    """Yields the marked layers that tensors come from, the nearest ones."""
    stack = [x.grad_fn for x in tensors if x.grad_fn is not None]
    seen = set(stack)
    while stack:
        node: Any = stack.pop()
        if isinstance(layer := getattr(node, "layer", None), nn.Module):
            yield layer
            continue
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                stack.append(before)
