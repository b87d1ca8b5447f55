"""A network that runs of commands can name, with a third of the layers of ResNet-20."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_n2uq import backbones


def resnet8(**arguments: Any) -> nn.Module:
    """ResNet-20 with one block per stage: a stride, a quantized shortcut, and a plain block before them."""
    network = backbones.resnet20(**arguments)
    for stage in (network.layer1, network.layer2, network.layer3):
        del stage[1:]
    return network


NETWORKS: dict[str, Callable[..., nn.Module]] = {"resnet8": resnet8}


def register() -> None:
    """Adds the networks to those that a config may name, in a process that ends with its command."""
    backbones.BACKBONES.update(NETWORKS)
