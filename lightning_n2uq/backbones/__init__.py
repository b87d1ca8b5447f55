"""The networks, chosen by name."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import nn

from lightning_n2uq.backbones.by_policy import build_by_policy
from lightning_n2uq.backbones.integer import INTEGER_OPTIONS
from lightning_n2uq.backbones.mobilenet_v2 import mobilenet_v2
from lightning_n2uq.backbones.own import find_own, quantizes_itself, register, registered, taken
from lightning_n2uq.backbones.resnet import resnet18, resnet20, resnet34, resnet50
from lightning_n2uq.utils.torchvision_models import TIMM, TORCHVISION
from lightning_n2uq.utils.validation import check

CONVERTED = (TORCHVISION, TIMM)
"""Prefixes of networks that are built by their library and quantized by a policy (`convert`)."""

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "mobilenet_v2": mobilenet_v2,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet34": resnet34,
    "resnet50": resnet50,
}
"""Networks by config name."""


def names() -> list[str]:
    """Returns the names that `build` takes."""
    return list(BACKBONES)


def build(name: str, **arguments: Any) -> nn.Module:  # noqa: ANN401 -- each network types its own arguments
    """Builds the network `name`, one of another library (`CONVERTED`), or one of the user's own (`own`).

    Any of them takes `policy`, the fields of `convert.Policy`, for methods and bits layer by layer. A network
    of another library and a float one of the user's own get what `convert.build_converted` does not know.

    Raises:
        ValueError: The name or an argument is unknown, or the network refuses a value.
    """
    own = find_own(name)
    if own is not None and quantizes_itself(own):
        return own(**taken(name, own, arguments))
    if own is not None or name.startswith(CONVERTED):
        from lightning_n2uq.convert import build_converted  # only where one is asked for

        for option in INTEGER_OPTIONS:
            value = arguments.pop(option, None)
            check(
                not value,
                option,
                value,
                f"is null with backbone {name!r}; integer-only are {', '.join(BACKBONES)}",
            )

        of_network = {
            key: arguments.pop(key) for key in arguments.keys() - signature(build_converted).parameters
        }
        if of_network:
            arguments["model_args"] = {**(arguments.get("model_args") or {}), **of_network}
        try:
            return build_converted(name, own=own, **arguments)
        except TypeError as error:
            raise ValueError(f"backbone {name!r}: {error}") from error
    if name not in BACKBONES:
        raise ValueError(
            f"backbone: got {name!r}, allowed are {', '.join([*BACKBONES, *registered()])}, "
            "torchvision/<model>, timm/<model>, or the import path of a module's class"
        )
    policy = arguments.pop("policy", None)
    try:
        if policy is not None:
            return build_by_policy(name, BACKBONES[name], policy, arguments)
        return BACKBONES[name](**arguments)
    except TypeError as error:
        raise ValueError(f"backbone {name!r}: {error}") from error


__all__ = [
    "BACKBONES",
    "build",
    "mobilenet_v2",
    "names",
    "register",
    "resnet18",
    "resnet20",
    "resnet34",
    "resnet50",
]
