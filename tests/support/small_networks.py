"""Small networks for several tests: one that runs of commands can name, and a Swin transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_n2uq import backbones


def resnet8(**arguments: Any) -> nn.Module:
    """ResNet-20 with one block per stage: a stride, a quantized shortcut, and a plain block before them."""
    network = backbones.resnet20(**arguments)
    for stage in (network.layer1, network.layer2, network.layer3):
        del stage[1:]
    return network


def small_swin() -> nn.Module:
    """Swin with three attentions in windows, one of them shifted; images `[3, 32, 32]`, five classes."""
    import timm

    torch.manual_seed(0)
    network: nn.Module = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=12,
        depths=(2, 1),
        num_heads=(2, 3),
        num_classes=5,
    )
    return network.eval()


NETWORKS: dict[str, Callable[..., nn.Module]] = {"resnet8": resnet8}


def register() -> None:
    """Adds the networks to those that a config may name, in a process that ends with its command."""
    backbones.BACKBONES.update(NETWORKS)
