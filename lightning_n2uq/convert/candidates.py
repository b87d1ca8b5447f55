"""The layers of a network that could be quantized, part by part, with their places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_n2uq.convert.order import Order, Trace, executed, order_of, registered
from lightning_n2uq.convert.policy import Layer
from lightning_n2uq.convert.replace import layer_types

Named = list[tuple[str, nn.Module]]


def weighted_modules(model: nn.Module, parts: Sequence[str] = ()) -> Named:
    """Returns modules with a parameter of their own that has more than one dimension above 1.

    An attention layer stands for its output projection as well.

    Args:
        model: The model; names are those in it.
        parts: Names of modules to look in; without any, all of `model`.

    Raises:
        ValueError: The model has no part of such a name.
    """
    found: dict[nn.Module, str] = {}
    for part in parts or ("",):
        for name, module in _weighted(_part(model, part)):
            found.setdefault(module, ".".join(x for x in (part, name) if x))
    return [(name, module) for module, name in found.items()]


def candidates(model: nn.Module, parts: Sequence[str], example: Any) -> dict[nn.Module, Layer]:  # noqa: ANN401
    """Returns the convertible layers of all parts, with their places.

    Args:
        model: The model.
        parts: Names of modules to look in; each has a first and a last layer of its own.
        example: An input of `model` that tells the order of execution, or None.
    """
    weighted = weighted_modules(model)
    convertible = {module for _, module in weighted if layer_types(module)}
    trace = None if example is None else executed(model, [m for _, m in weighted], example)
    found: dict[nn.Module, Layer] = {}
    for part in parts or ("",):
        inside = weighted_modules(model, (part,) if part else ())
        twins = _twins(inside, part, convertible)
        inside = [(name, module) for name, module in inside if module not in twins]
        for order, group in _orders(inside, part, trace, convertible):
            for i, module in enumerate(order.layers):
                places = module in order.first, module in order.last
                name = group[module]
                found[module] = Layer(name, layer_types(module), i, len(order.layers), *places, order.source)
        found |= {copy: replace(found[module], name=name) for copy, (name, module) in twins.items()}
    return found


def _twins(inside: Named, part: str, convertible: set[nn.Module]) -> dict[nn.Module, tuple[str, nn.Module]]:
    """Returns the layers of a part's children that are copies of an earlier child, a teacher of its student.

    Each layer of a copy is treated as its counterpart is, so that averages of weights fit.

    Returns:
        The copy's name and its counterpart by the layer of a copy.
    """
    depth = len(part.split(".")) if part else 0
    children: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in inside:
        if module in convertible:
            children.setdefault(name.split(".")[depth], []).append((name, module))
    originals: dict[tuple[object, ...], list[tuple[str, nn.Module]]] = {}
    twins = {}
    for layers in children.values():
        form = tuple(_form(name.split(".")[depth + 1 :], module) for name, module in layers)
        pairs = list(zip(layers, originals.get(form, ()), strict=False))
        if pairs and all(_equal(copy, module) for (_, copy), (_, module) in pairs):
            twins.update({copy: (name, module) for (name, copy), (_, module) in pairs})
        originals.setdefault(form, layers)
    return twins


def _equal(copy: nn.Module, module: nn.Module) -> bool:
    """Returns whether parameters have equal values, as copies have when they are made."""
    pairs = zip(copy.parameters(), module.parameters(), strict=True)
    return all(not a.is_meta and not b.is_meta and torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


def _form(path: list[str], module: nn.Module) -> tuple[object, ...]:
    return (*path, type(module), *(tuple(p.shape) for p in module.parameters()))


def _orders(
    inside: Named, part: str, trace: Trace | None, convertible: set[nn.Module]
) -> Iterator[tuple[Order, dict[nn.Module, str]]]:
    """Yields the order of a part; children that an example does not reach have an order of their own."""
    layers = {module: name for name, module in inside if module in convertible}
    order = None if trace is None else order_of(list(layers), trace, convertible)
    if order is None:
        yield registered(list(layers), [module for _, module in inside]), layers
        return
    yield order, layers
    depth = len(part.split(".")) if part else 0
    groups: dict[str, list[nn.Module]] = {}
    for module, name in layers.items():
        if module not in order.layers:
            groups.setdefault(name.split(".")[depth], []).append(module)
    for group in groups.values():
        yield registered(group, group), layers


def _part(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        children = ", ".join(child for child, _ in model.named_children())
        raise ValueError(f"modules: got {name!r}, allowed are {children} and their parts") from None


def _weighted(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    inside_attention: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside_attention or "parametrizations" in name.split("."):
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside_attention.update(module.modules())
        own = module.parameters(recurse=False)
        if layer_types(module) or any(sum(n > 1 for n in parameter.shape) > 1 for parameter in own):
            yield name, module
