"""Networks of torchvision and timm by name, quantized by a policy: what a config's `backbone` can be."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lightning_n2uq.convert.policy import Policy
from lightning_n2uq.convert.quantize import quantize_model
from lightning_n2uq.utils.extras import how_to_install
from lightning_n2uq.utils.torchvision_models import TIMM, TORCHVISION, build_torchvision, downloading
from lightning_n2uq.utils.validation import check

_RULE_FOR_DOWNSAMPLING = {"name": "*downsample*", "quantize": False}


def build_converted(
    name: str,
    policy: Mapping[str, Any] | None = None,
    weight_bits: int = 4,
    activation_bits: int = 4,
    weight_quantizer: str = "n2uq",
    activation_quantizer: str = "n2uq",
    quantize_downsample: bool = True,
    num_classes: int = 1000,
    in_channels: int = 3,
    pretrained: bool = False,
    model_args: Mapping[str, Any] | None = None,
    own: Callable[..., nn.Module] | None = None,
) -> nn.Module:
    """Builds `torchvision/<model>`, `timm/<model>` or `own`, quantizes it and logs the report.

    The structure depends on the arguments only, so that a checkpoint loads into it again; input ranges are
    fitted to the first batch in training (or by `convert.calibrate`).

    Args:
        name: The network, such as `torchvision/resnet18` or `timm/mobilenetv3_small_100`.
        policy: The fields of `convert.Policy`, above all `rules`; bits and methods default to the next four.
        weight_bits: The bits of weights, 2 to 8; 32 with `float`.
        activation_bits: The bits of activations, 2 to 8; 32 with `float`.
        weight_quantizer: The method for weights, a key of `WEIGHT_QUANTIZERS`.
        activation_quantizer: The method for activations, a key of `ACTIVATION_QUANTIZERS`.
        quantize_downsample: False leaves layers with `downsample` in their name in full precision, unless a
            rule of the policy decides about them.
        num_classes: The number of outputs.
        in_channels: The channels of the image; torchvision's networks take 3 only.
        pretrained: Whether to start from the library's default weights (downloaded or cached). Their number
            of classes has to be `num_classes` (torchvision), or the last layer is replaced (timm).
        model_args: Further arguments of the network's constructor.
        own: A user's own float network, which `name` names in messages.

    Raises:
        ValueError: A network or argument is unknown, or weights cannot be had.
    """
    values: dict[str, Any] = {
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "weight_quantizer": weight_quantizer,
        "activation_quantizer": activation_quantizer,
        **(policy or {}),
    }
    if not quantize_downsample:
        values["rules"] = [*(values.get("rules") or []), _RULE_FOR_DOWNSAMPLING]
    checked = Policy.from_mapping(values)  # before the network is built or downloaded
    if own is not None:
        return _quantized(
            name, _own(own, num_classes, in_channels, pretrained, dict(model_args or {})), checked
        )
    prefixes = (TORCHVISION, TIMM)
    check(name.startswith(prefixes), "backbone", name, f"are names that start with {' or '.join(prefixes)}")
    build = _torchvision if name.startswith(TORCHVISION) else _timm
    try:
        model = build(name, num_classes, in_channels, pretrained, dict(model_args or {}))
    except TypeError as error:
        raise ValueError(f"arguments of {name}: got {dict(model_args or {})}, refused: {error}") from error
    return _quantized(name, model, checked)


def _quantized(name: str, model: nn.Module, policy: Policy) -> nn.Module:
    # Lightning's, not that of its utilities: it knows the rank without a trainer, too.
    from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

    rank_zero_info(f"{name} by the policy:\n{quantize_model(model, policy)}")
    return model


def _own(
    maker: Callable[..., nn.Module],
    num_classes: int,
    in_channels: int,
    pretrained: bool,
    args: dict[str, Any],
) -> nn.Module:
    check(not pretrained, "pretrained", pretrained, "is false with a network of your own (see init_from)")
    known = inspect.signature(maker).parameters
    given = {"num_classes": num_classes, "in_channels": in_channels}
    return maker(**{**{name: value for name, value in given.items() if name in known}, **args})


def _torchvision(
    name: str, num_classes: int, in_channels: int, pretrained: bool, args: dict[str, Any]
) -> nn.Module:
    check(in_channels == 3, "in_channels", in_channels, "is 3 with torchvision's networks; timm's take any")
    if not pretrained:
        args["num_classes"] = num_classes
    model, classes = build_torchvision(name, "backbone", pretrained=pretrained, **args)
    if pretrained and classes != num_classes:
        raise ValueError(
            f"pretrained: {name!r} has {classes} classes, num_classes is {num_classes}; timm's adapt"
        )
    return model


def _timm(name: str, num_classes: int, in_channels: int, pretrained: bool, args: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"backbone: got {name!r}, which needs timm: {how_to_install('timm')}") from error
    own_name = name.removeprefix(TIMM)
    if not timm.is_model(own_name):
        raise ValueError(f"backbone: got {name!r}, timm has no model {own_name!r}")
    args |= {"num_classes": num_classes, "in_chans": in_channels}
    with downloading(name, "pretrained"):
        model: nn.Module = timm.create_model(own_name, pretrained=pretrained, **args)
    return model
