"""Networks of torchvision and timm by name, quantized by a policy: what a config's `backbone` can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_n2uq.convert.policy import Policy
from lightning_n2uq.convert.quantize import quantize_model

PREFIXES = ("torchvision/", "timm/")
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
) -> nn.Module:
    """Builds `torchvision/<model>` or `timm/<model>` and quantizes it; the report is logged.

    The structure depends on the arguments only, so that a checkpoint loads into it again; input ranges are
    fitted to the first batch in training (or by `convert.calibrate`).

    Args:
        name: `torchvision/resnet18`, `timm/mobilenetv3_small_100`.
        policy: Keys of `convert.Policy`, above all `rules`; bits and methods default to the next four.
        weight_bits: 2 to 8; 32 with `float`.
        activation_bits: 2 to 8; 32 with `float`.
        weight_quantizer: Key of `WEIGHT_QUANTIZERS`.
        activation_quantizer: Key of `ACTIVATION_QUANTIZERS`.
        quantize_downsample: False leaves layers with `downsample` in their name in full precision, after all
            rules of the policy.
        num_classes: Outputs.
        in_channels: Channels of the image; torchvision's networks take 3 only.
        pretrained: Whether to start from the library's default weights (downloaded or cached); its last
            layer then has to fit `num_classes` (torchvision) or is replaced (timm).
        model_args: Further arguments of the library's constructor.

    Raises:
        ValueError: An unknown network or argument, or weights that cannot be had.
    """
    defaults = {
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "weight_quantizer": weight_quantizer,
        "activation_quantizer": activation_quantizer,
    }
    values = {**defaults, **(policy or {})}
    if not quantize_downsample:
        values["rules"] = [*(values.get("rules") or []), _RULE_FOR_DOWNSAMPLING]
    checked = Policy.from_mapping(values)  # before the network is built or downloaded
    build = {"torchvision/": _torchvision, "timm/": _timm}
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    if prefix is None:
        raise ValueError(f"backbone: got {name!r}, allowed are names that start with {' or '.join(PREFIXES)}")
    try:
        model = build[prefix](
            name.removeprefix(prefix), num_classes, in_channels, pretrained, dict(model_args or {})
        )
    except TypeError as error:
        raise ValueError(f"model_args: got {dict(model_args or {})}, {name} refuses: {error}") from error
    except OSError as error:  # urllib's and the hub's errors are OSErrors
        raise ValueError(
            f"pretrained: weights of {name!r} could not be read or downloaded ({error})"
        ) from error
    # Lightning's, not that of its utilities: it knows the rank without a trainer, too.
    from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

    rank_zero_info(f"{name} by the policy:\n{quantize_model(model, checked)}")
    return model


def _torchvision(
    name: str, num_classes: int, in_channels: int, pretrained: bool, args: dict[str, Any]
) -> nn.Module:
    from torchvision import models  # only where one is asked for

    if name not in models.list_models(models):
        raise ValueError(f"backbone: torchvision has no classification model {name!r}")
    if in_channels != 3:
        raise ValueError(f"in_channels: got {in_channels}, torchvision's networks take 3; timm's take any")
    if not pretrained:
        args["num_classes"] = num_classes
    model: nn.Module = models.get_model(name, weights="DEFAULT" if pretrained else None, **args)
    classes = len(models.get_model_weights(name).DEFAULT.meta["categories"])
    if pretrained and classes != num_classes:
        raise ValueError(
            f"pretrained: {name!r} has {classes} classes, num_classes is {num_classes}; timm's adapt"
        )
    return model


def _timm(name: str, num_classes: int, in_channels: int, pretrained: bool, args: dict[str, Any]) -> nn.Module:
    try:
        import timm  # an extra: pip install lightning_n2uq[timm]
    except ImportError as error:
        raise ValueError(
            f"backbone: got 'timm/{name}', which needs timm: pip install 'lightning_n2uq[timm]'"
        ) from error
    if not timm.is_model(name):
        raise ValueError(f"backbone: timm has no model {name!r}")
    model: nn.Module = timm.create_model(
        name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels, **args
    )
    return model
