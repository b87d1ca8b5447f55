"""Names of our entries in the published N2UQ format, and the constants that format carries along.

The published blocks count their parts (`bias11`, `prelu1`, `bias12`, `quan1`, `conv1`, `bn1`, then 2, then 3)
and store a quantizer beside its convolution; ours nest it inside. Everything here is a table of names: no
tensor is touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from lightning_n2uq.backbones.blocks import BasicBlock, Bottleneck
from lightning_n2uq.backbones.mobilenet_v2 import InvertedResidual, MobileNetV2
from lightning_n2uq.backbones.resnet import ResNet
from lightning_n2uq.layers import QuantConv2d
from lightning_n2uq.ops.tables import WIDTH_FLOOR
from lightning_n2uq.quantizers import (
    PACT,
    FixedThresholdQuantizer,
    LearnableThresholdQuantizer,
    UniformGrid,
)

QUANTIZER_CONSTANTS = {"two": 2.0, "one": 1.0, "zero": 0.0, "minusone": -1.0, "eps": WIDTH_FLOOR}
"""Beside every threshold quantizer, `[1]` each. `eps` is the floor of the widths."""

CONVOLUTION_CONSTANTS = {"clip_val": 2.0, "zero": 0.0}
"""Beside every quantized convolution, `[1]` each. `clip_val` looks trainable, but never gets a gradient."""

_THRESHOLD_NAMES = {"start": "start", "widths": "a", "scale_in": "scale1", "scale_out": "scale2"}


@dataclass(frozen=True)
class OfficialName:
    """Where one entry of our state dict lives in the published format.

    Attributes:
        key: Published key.
        channel_shaped: Whether it is stored as `[1, C, 1, 1]` there and `[C]` here.
    """

    key: str
    channel_shaped: bool = False


def official_names(model: nn.Module) -> dict[str, OfficialName]:
    """Returns the published name of every entry of `model.state_dict()`.

    Raises:
        ValueError: The model is none of the paper's networks with N2UQ's quantizers.
    """
    rename = _renamer(model)
    return {key: rename(key) for key in model.state_dict()}


def official_constants(model: nn.Module) -> dict[str, float]:
    """Returns the published key and value of every constant that the format stores, each of shape `[1]`."""
    constants: dict[str, float] = {}
    rename = _renamer(model)
    for name, module in model.named_modules():
        if not isinstance(module, QuantConv2d):
            continue
        stem = rename(f"{name}.weight").key.removesuffix("weight")
        constants.update({stem + key: value for key, value in CONVOLUTION_CONSTANTS.items()})
        if isinstance(module.activation_quantizer, LearnableThresholdQuantizer):
            start = rename(f"{name}.activation_quantizer.start").key.removesuffix("start")
            constants.update({start + key: value for key, value in QUANTIZER_CONSTANTS.items()})
    return constants


def _renamer(model: nn.Module) -> Callable[[str], OfficialName]:
    if not isinstance(model, ResNet | MobileNetV2):
        raise ValueError(
            f"model: got {type(model).__name__}, the published format knows ResNet and MobileNetV2 of "
            "lightning_n2uq.backbones"
        )
    _check_quantizers(model)
    outputs = {name: _output_number(block) for name, block in model.named_modules() if _is_block(block)}
    quantized = {
        f"{name}."
        for name, module in model.named_modules()
        if name.endswith("downsample") and isinstance(module[0], QuantConv2d)
    }

    def rename(key: str) -> OfficialName:
        head, _, rest = key.partition(".act_out.")
        if rest:
            return _activation(f"{head}.", outputs[head], rest)
        if match := re.fullmatch(r"(.*\.)act(\d)\.(\w+)", key):
            return _activation(_root(match[1]), match[2], match[3])
        stem, _, rest = key.partition("downsample.")
        if rest and stem + "downsample." in quantized:
            return OfficialName(f"{stem}downsample.{_quantized_downsample(rest)}")
        if match := re.fullmatch(r"(.*\.)conv(\d)\.activation_quantizer\.(\w+)", key):
            inside = "clip_val" if match[3] == "clip" else _THRESHOLD_NAMES[match[3]]
            return OfficialName(f"{_root(match[1])}quan{match[2]}.{inside}")
        return OfficialName(_root(key))

    return rename


def _root(key: str) -> str:
    return re.sub(r"^features\.", "feature.", key)


def _activation(block: str, number: str, part: str) -> OfficialName:
    if part == "slope":
        return OfficialName(f"{block}prelu{number}.weight")
    return OfficialName(f"{block}bias{number}{1 if part == 'bias_in' else 2}.bias", channel_shaped=True)


def _quantized_downsample(rest: str) -> str:
    """Ours: `0` quantized convolution, `1` norm. Published: `0` quantizer, `1` convolution, `2` norm."""
    child, _, inside = rest.partition(".")
    if child == "1":
        return f"2.{inside}"
    if inside.startswith("activation_quantizer."):
        return f"0.{_THRESHOLD_NAMES[inside.removeprefix('activation_quantizer.')]}"
    return f"1.{inside}"


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, BasicBlock | Bottleneck | InvertedResidual)


def _output_number(block: nn.Module) -> str:
    """Number of the activation after the residual sum: basic blocks count on, bottlenecks start over at 0."""
    return "3" if isinstance(block, BasicBlock) else "0"


def _check_quantizers(model: nn.Module) -> None:
    grids = [name for name, module in model.named_modules() if isinstance(module, UniformGrid)]
    if grids:
        raise ValueError(
            f"model: {grids[0]} belongs to an integer-only network, which the format does not know"
        )
    last = "features.18.conv1" if isinstance(model, MobileNetV2) else None
    for name, module in model.named_modules():
        if not isinstance(module, QuantConv2d):
            continue
        wanted = PACT if name == last else LearnableThresholdQuantizer
        activation, weight = module.activation_quantizer, module.weight_quantizer
        fits = isinstance(activation, wanted) and not isinstance(activation, FixedThresholdQuantizer)
        if not fits or getattr(weight, "name", None) != "n2uq":
            raise ValueError(
                f"model: {name} has the quantizers {type(weight).__name__} and {type(activation).__name__}, "
                f"the published format holds EntropyPreservingWeightQuantizer and {wanted.__name__}"
            )
