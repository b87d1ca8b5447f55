"""The package's own networks with bits of their own for every layer, by a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from torch import nn

from lightning_n2uq.backbones.integer import INTEGER_OPTIONS
from lightning_n2uq.layers import QuantConv2d, QuantLinear, QuantSpec
from lightning_n2uq.utils.validation import check

_FIELDS = ("weight_bits", "activation_bits", "weight_quantizer", "activation_quantizer")
_FULL_PRECISION = QuantSpec(32, 32, "float", "float")
_LAST_CONVOLUTION = {"name": "features.18.conv1", "activation_quantizer": "pact"}
"""MobileNetV2's, which has PACT beside N2UQ, as in its paper."""


def build_by_policy(
    name: str,
    build: Callable[..., nn.Module],
    policy: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> nn.Module:
    """Builds a network whose quantized layers get methods and bits from `policy`, a layer at a time.

    Args:
        name: The network.
        build: Its function.
        policy: The fields of `convert.Policy`, above all `rules`; methods and bits default to `arguments`.
        arguments: The arguments of `build`.

    Raises:
        ValueError: The policy is not allowed, names a layer that stays in full precision in these networks,
            or comes with `residual_bits` or `first_last_bits`.
    """
    from lightning_n2uq.convert.candidates import candidates  # convert builds on this package

    for option in INTEGER_OPTIONS:
        check(not arguments.get(option), option, arguments.get(option), "is null beside a policy")
    defaults = {key: p.default for key, p in signature(build).parameters.items()}
    checked = full_policy(name, policy, {**defaults, **arguments})
    spec = checked.spec()
    network = build(**{**arguments, **{field: getattr(spec, field) for field in _FIELDS}})
    for module, layer in candidates(network, checked.modules, None).items():
        chosen, _ = checked.decide(layer)
        if isinstance(module, QuantConv2d | QuantLinear):
            pair = (chosen or _FULL_PRECISION).build(len(module.weight))
            module.weight_quantizer, module.activation_quantizer = pair
        elif chosen is not None:
            raise ValueError(
                f"policy: got one that quantizes {layer.name!r}, which {name} keeps in full precision, "
                "allowed is one that leaves it out, or a network of torchvision or timm"
            )
    return network


def full_policy(name: str, policy: Mapping[str, Any] | None, arguments: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Returns the `Policy` of a network: `policy`, and what the network's arguments say beside it.

    Args:
        name: The network.
        policy: The fields of `convert.Policy` that are given, or None.
        arguments: The arguments of the network: methods, bits and `quantize_downsample`.
    """
    from lightning_n2uq.convert.policy import Policy

    values = {key: arguments[key] for key in _FIELDS} | dict(policy or {})
    rules = list(values.get("rules") or [])
    if not arguments.get("quantize_downsample", True):
        rules.append({"name": "*downsample*", "quantize": False})
    if name == "mobilenet_v2" and str(values["activation_quantizer"]).startswith("n2uq"):
        rules.append(_LAST_CONVOLUTION)
    return Policy.from_mapping({**values, "rules": rules})
