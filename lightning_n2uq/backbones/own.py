"""Networks of a user's own: registered under a name, or named by their import path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from lightning_n2uq.backbones.integer import INTEGER_OPTIONS
from lightning_n2uq.utils.validation import check

Maker = Callable[..., nn.Module]
M = TypeVar("M", bound=Maker)
_REGISTERED: dict[str, Maker] = {}
_BY_BITS = "weight_bits"
OFFERED = (
    "num_classes",
    "in_channels",
    "weight_bits",
    "activation_bits",
    "weight_quantizer",
    "activation_quantizer",
    "quantize_downsample",
    *INTEGER_OPTIONS,
)
"""Arguments that every network is offered, and one of the user's own need not take."""


def register(name: str) -> Callable[[M], M]:
    """Makes a network known as `backbone: NAME`, and its function usable by import path.

    The network may be a class or a function that returns a module. It gets `num_classes` and `in_channels`
    where it takes them. One that takes `weight_bits` builds its own quantized layers and gets bits and
    methods as this package's networks do; any other one is float and quantized by a policy, as timm's are.

    Example::

        @register("tiny")
        def tiny(num_classes: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes))

    Args:
        name: The name in a config, without dots and slashes.

    Raises:
        ValueError: The name is of another form, or of a network of this package.
    """
    from lightning_n2uq.backbones import BACKBONES

    allowed = f"is an identifier other than {', '.join(BACKBONES)}"
    check(name.isidentifier() and name not in BACKBONES, "name", name, allowed)

    def keep(maker: M) -> M:
        _REGISTERED[name] = maker
        return maker

    return keep


def registered() -> list[str]:
    """Returns the names of registered networks."""
    return list(_REGISTERED)


def find_own(name: str) -> Maker | None:
    """Returns the network that a name or an import path (`module.Class`) stands for; None for other names.

    A checkpoint names its backbone, and what it names is called: by import path that can only be a class of
    modules or a registered function.

    Raises:
        ValueError: The module cannot be imported, or holds no network of that name.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    module, dot, attribute = name.rpartition(".")
    if not dot or "/" in name or not name.replace(".", "").isidentifier():
        return None
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever the user's module raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"backbone: got {name!r}, cannot import {module!r} ({reason})") from error
    is_network = isinstance(found, type) and issubclass(found, nn.Module)
    if not is_network and found not in _REGISTERED.values():
        what = "nothing of that name" if found is None else f"a {type(found).__name__}"
        raise ValueError(
            f"backbone: got {name!r}, which is {what}; allowed are classes of modules, and functions with "
            "@lightning_n2uq.backbones.register(NAME)"
        )
    return found  # type: ignore[no-any-return]


def quantizes_itself(maker: Maker) -> bool:
    """Returns whether a network takes bits, and so builds its own quantized layers."""
    return _BY_BITS in inspect.signature(maker).parameters


def taken(name: str, maker: Maker, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments that a network takes; of those that every network is offered it may leave some.

    Raises:
        ValueError: One that only this network was given is not among them.
    """
    parameters = inspect.signature(maker).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return arguments
    if unknown := sorted(arguments.keys() - parameters.keys() - set(OFFERED)):
        raise ValueError(f"backbone_args: got {', '.join(unknown)}, {name} takes {', '.join(parameters)}")
    return {name: value for name, value in arguments.items() if name in parameters}
