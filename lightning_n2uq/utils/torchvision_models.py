"""Classification networks of torchvision by name; the package is imported where one is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

TORCHVISION, TIMM = "torchvision/", "timm/"
"""The prefixes in configs of networks that these libraries build."""


def default_weights(source: str, argument: str) -> Any:  # noqa: ANN401  # torchvision has no types
    """Returns torchvision's description of the default weights of a network; nothing is downloaded.

    Args:
        source: The network's name, with or without `TORCHVISION` in front.
        argument: The user's name for `source`, used in errors.

    Raises:
        ValueError: torchvision has no such classification network.
    """
    from torchvision import models

    name = source.removeprefix(TORCHVISION)
    if name not in models.list_models(models):
        raise ValueError(f"{argument}: got {source!r}, torchvision has no classification model {name!r}")
    return models.get_model_weights(name).DEFAULT


def build_torchvision(
    source: str,
    argument: str,
    *,
    pretrained: bool,
    **arguments: Any,  # noqa: ANN401
) -> tuple[nn.Module, int]:
    """Builds a network; returns it and the number of classes of its default weights.

    Args:
        source: The network's name, with or without `TORCHVISION` in front.
        argument: The user's name for `source`, used in errors.
        pretrained: Whether to load the default weights, from torch's cache or downloaded.
        arguments: Further arguments of torchvision's constructor.

    Raises:
        ValueError: torchvision has no such network, or its weights cannot be had.
    """
    from torchvision import models

    weights = default_weights(source, argument)
    with downloading(source, argument):
        name = source.removeprefix(TORCHVISION)
        model: nn.Module = models.get_model(name, weights=weights if pretrained else None, **arguments)
    return model, len(weights.meta["categories"])


@contextmanager
def downloading(source: str, argument: str) -> Iterator[None]:
    """Turns the errors of a failed download into one `ValueError`."""
    try:
        yield
    except OSError as error:  # urllib's errors are OSErrors
        raise ValueError(
            f"{argument}: weights of {source!r} are neither in {torch.hub.get_dir()!r} "
            f"nor could be downloaded ({error})"
        ) from error
