"""Warnings of arguments that have no effect beside the others."""

import inspect
from collections.abc import Mapping
from typing import Any


def void_choices(constructor: Any, chosen: Mapping[str, Any]) -> list[str]:  # noqa: ANN401
    """Returns one line for each argument that differs from its default and has no effect beside the others.

    Args:
        constructor: The class or function whose signature holds the defaults.
        chosen: Its arguments, by name.
    """
    reasons = {name: reason for reason, names in _reasons(chosen).items() for name in names}
    parameters = inspect.signature(constructor).parameters
    return [
        f"{name}: got {chosen[name]!r}, which has no effect {reason}"
        for name, reason in reasons.items()
        if not _same(chosen[name], parameters[name].default)
    ]


def _reasons(chosen: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Returns arguments without effect, by the reason."""
    found: dict[str, tuple[str, ...]] = {}
    if chosen["teacher"] is None:
        found["without a teacher"] = ("temperature", "hard_label_weight")
    elif chosen["hard_label_weight"] == 0:
        found["with a teacher and hard_label_weight 0"] = ("label_smoothing",)
    optimizer = chosen["optimizer"]
    found[f"with optimizer {optimizer}"] = ("betas",) if optimizer == "sgd" else ("momentum",)
    # MobileNetV2's last 1x1 convolution has a PACT quantizer whatever the others are.
    if chosen["activation_quantizer"] != "pact" and chosen["backbone"] != "mobilenet_v2":
        found["without activation_quantizer pact"] = ("pact_gradient",)
    if chosen["schedule"] == "published":
        found["with schedule published"] = ("warmup_steps",)
    if chosen["parameter_groups"] == "published":
        found["with parameter_groups published"] = ("quantizer_lr_multiplier",)
    return found


def _same(value: Any, default: Any) -> bool:  # noqa: ANN401
    if isinstance(default, tuple):
        return list(value) == list(default)
    return bool(value == default)
