"""Networks for dense tasks, by name, from torchvision and timm; either is imported where one is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_n2uq.utils.extras import how_to_install
from lightning_n2uq.utils.torchvision_models import TIMM, TORCHVISION, downloading
from lightning_n2uq.utils.validation import check


def build_torchvision(
    network: str, family: str, num_classes: int, pretrained: bool, network_args: Mapping[str, Any]
) -> nn.Module:
    """Builds a network of one of torchvision's families.

    Args:
        network: `torchvision/<model>`.
        family: `segmentation` or `detection`.
        num_classes: The number of classes, the background among them.
        pretrained: Whether its backbone starts from torchvision's default weights, cached or downloaded.
        network_args: Further arguments of the constructor.

    Raises:
        ValueError: There is no such network, an argument is unknown, or weights cannot be had.
    """
    from torchvision import models

    names = models.list_models(import_module(f"torchvision.models.{family}"))
    name = network.removeprefix(TORCHVISION)
    check(network.startswith(TORCHVISION) and name in names, "network", network, _allowed(names, family))
    if family == "segmentation":  # its constructors take further keywords and leave them unused
        taken = [
            key for key in inspect.signature(models.get_model_builder(name)).parameters if key != "kwargs"
        ]
        unknown = sorted(set(network_args) - set(taken))
        allowed = f"are {', '.join(taken)}"
        check(not unknown, "network_args", ", ".join(unknown), allowed)
    weights = "DEFAULT" if pretrained else None
    arguments = {"weights": None, "weights_backbone": weights, "num_classes": num_classes, **network_args}
    with downloading(network, "pretrained"):
        try:
            model: nn.Module = models.get_model(name, **arguments)
        except TypeError as error:
            raise ValueError(f"network_args: got {dict(network_args)}, {network} refuses: {error}") from error
    return model


def _allowed(names: list[str], family: str) -> str:
    beside = " or timm/<encoder>" if family == "segmentation" else ""
    return f"are {', '.join(TORCHVISION + name for name in names)}{beside}"


def build_timm_segmenter(
    network: str, num_classes: int, in_channels: int, pretrained: bool, network_args: Mapping[str, Any]
) -> nn.Module:
    """Builds `timm/<encoder>` with `PyramidHead` on its maps; the arguments are those of `build_torchvision`.

    Args:
        network: `timm/<encoder>`, one that has `features_only`.
        num_classes: The number of classes, the background among them.
        in_channels: The channels of an image.
        pretrained: Whether the encoder starts from timm's default weights, cached or downloaded.
        network_args: Further arguments of the encoder, and `head_width` for the head.

    Raises:
        ValueError: There is no such encoder, an argument is unknown, or weights cannot be had.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"network: got {network!r}, which needs timm: {how_to_install('timm')}") from error
    name, arguments = network.removeprefix(TIMM), dict(network_args)
    if not timm.is_model(name):
        raise ValueError(f"network: got {network!r}, timm has no model {name!r}")
    width = arguments.pop("head_width", 64)
    with downloading(network, "pretrained"):
        try:
            encoder: Any = timm.create_model(
                name, pretrained=pretrained, features_only=True, in_chans=in_channels, **arguments
            )
        except (TypeError, RuntimeError) as error:  # features_only raises RuntimeError where there is none
            reason = " ".join(str(error).split())
            raise ValueError(f"network: got {network!r} with {arguments}, timm refuses: {reason}") from error
    return EncoderWithHead(encoder, PyramidHead(encoder.feature_info.channels(), width, num_classes))


class PyramidHead(nn.Module):
    """Sums all maps of an encoder, coarse ones enlarged, and classifies every place.

    The top-down part of a feature pyramid (Lin et al., CVPR 2017) with one output, at the finest map's size.

    Args:
        channels: The channels of the encoder's maps, finest first.
        width: The channels of the sum.
        num_classes: The number of classes.
    """

    def __init__(self, channels: list[int], width: int, num_classes: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.smooth = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Returns logits `[B, num_classes, h, w]` at the size of the first map."""
        total = self.laterals[-1](maps[-1])
        for lateral, features in zip(self.laterals[-2::-1], maps[-2::-1], strict=True):
            side = lateral(features)
            total = side + F.interpolate(total, size=side.shape[-2:], mode="nearest")
        logits: Tensor = self.classify(self.smooth(total))
        return logits


class EncoderWithHead(nn.Module):
    """An encoder that returns several maps, and a head on them.

    Args:
        encoder: Returns maps `[B, C, h, w]`, finest first.
        head: Returns logits of the maps.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits `[B, num_classes, H, W]` at the size of the images."""
        logits = self.head(self.encoder(images))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
