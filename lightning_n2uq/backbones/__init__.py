"""The networks, chosen by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_n2uq.backbones.resnet import resnet18, resnet20, resnet34, resnet50

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet34": resnet34,
    "resnet50": resnet50,
}
"""Networks by config name."""


def names() -> list[str]:
    """Names that `build` takes."""
    return list(BACKBONES)


def build(name: str, **arguments: Any) -> nn.Module:  # noqa: ANN401 -- each network types its own arguments
    """Builds the network `name`.

    Raises:
        ValueError: an unknown name, an unknown argument, or a value that the network refuses.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone: got {name!r}, allowed are {', '.join(BACKBONES)}")
    try:
        return BACKBONES[name](**arguments)
    except TypeError as error:
        raise ValueError(f"backbone {name!r}: {error}") from error


__all__ = ["BACKBONES", "build", "names", "resnet18", "resnet20", "resnet34", "resnet50"]
