"""Switches for the points where the published N2UQ code and the paper, or our defaults, differ.

- Learning rate of quantizer parameters: all at a tenth by default; `published_parameter_groups` leaves some
  at the full rate, as the published filter does.
- Schedule: linear, per step, 0 after the last one by default; `published_schedule` steps per epoch and runs
  the last epoch at 0.
- Comparison with a threshold, gradient of the weights, gradient of PACT's clip: `set_numerics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_n2uq.backbones.mobilenet_v2 import MobileNetV2
from lightning_n2uq.interop import official_names
from lightning_n2uq.quantizers import PACT, EntropyPreservingWeightQuantizer, LearnableThresholdQuantizer

QUANTIZER_LR = 0.1
_SLOW = ("quan1.a", "quan2.a", "scale", "start")
_SLOW_IN_MOBILENET = (*_SLOW, "quan3.a")


def published_parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """The three groups of the published code, which picks them by substrings of its parameter names.

    Its filter misses `quan3.a` in ResNets (the third quantizer of a bottleneck) and `downsample.0.a`: those
    widths learn at the full rate. Only 4-D weights decay, so that the last linear layer does not.

    Args:
        model: A network of the paper (`lightning_n2uq.interop` knows its published names).
        lr: Learning rate of weights and of the rest; quantizer parameters get a tenth.
        weight_decay: Of convolution weights.

    Returns:
        Groups `quantizer`, `rest`, `weights`, in the published order.

    Raises:
        ValueError: `model` has no published names.
    """
    names = official_names(model)
    slow = _SLOW_IN_MOBILENET if isinstance(model, MobileNetV2) else _SLOW
    members: dict[str, list[nn.Parameter]] = {"quantizer": [], "rest": [], "weights": []}
    for name, parameter in model.named_parameters():
        official = names[name].key
        if any(part in official for part in slow):
            members["quantizer"].append(parameter)
        else:
            members["weights" if parameter.ndim == 4 else "rest"].append(parameter)
    rates = {"quantizer": lr * QUANTIZER_LR, "rest": lr, "weights": lr}
    decay = {"quantizer": 0.0, "rest": 0.0, "weights": weight_decay}
    return [
        {"params": parameters, "name": name, "lr": rates[name], "weight_decay": decay[name]}
        for name, parameters in members.items()
    ]


def published_schedule(epochs: int) -> Callable[[int], float]:
    """`factor(epoch) = 1 - (epoch + 1) / epochs`: the published schedule steps before each epoch.

    The first epoch already runs below the base rate, the last one at 0.

    Raises:
        ValueError: `epochs` below 1.
    """
    if epochs < 1:
        raise ValueError(f"epochs: got {epochs}, allowed is 1 or more")
    return lambda epoch: max(0.0, 1.0 - (epoch + 1) / epochs)


def published_schedule_factor(total_steps: float, epochs: int | None) -> Callable[[int], float]:
    """`published_schedule` as a function of the optimizer step, constant within an epoch.

    Args:
        total_steps: Optimizer steps of the whole run.
        epochs: Epochs of the whole run.

    Raises:
        ValueError: The length is not known in epochs.
    """
    if epochs is None or epochs < 1 or not math.isfinite(total_steps):
        raise ValueError("schedule: got 'published', which needs trainer.max_epochs to be set")
    steps_per_epoch = max(1, math.ceil(total_steps / epochs))
    by_epoch = published_schedule(epochs)
    return lambda step: by_epoch(step // steps_per_epoch)


def set_numerics(
    model: nn.Module,
    threshold_comparison: str = ">",
    weight_gradient: str = "scaled",
    pact_gradient: str = "paper",
) -> None:
    """Sets the numerical switches of every N2UQ and PACT quantizer in `model`.

    Args:
        model: Any network with quantizers.
        threshold_comparison: `>` (the published code) or `>=` (an input at a threshold gets the upper code).
        weight_gradient: `scaled` (the published code's `1/S`) or `straight_through`.
        pact_gradient: `paper` or `published`, of PACT's clip.

    Raises:
        ValueError: A value that is not allowed.
    """
    allowed = {
        "threshold_comparison": (threshold_comparison, (">", ">=")),
        "weight_gradient": (weight_gradient, ("scaled", "straight_through")),
        "pact_gradient": (pact_gradient, ("paper", "published")),
    }
    for name, (value, values) in allowed.items():
        if value not in values:
            raise ValueError(f"{name}: got {value!r}, allowed are {', '.join(values)}")
    for module in model.modules():
        if isinstance(module, LearnableThresholdQuantizer):
            module.comparison = threshold_comparison
        elif isinstance(module, EntropyPreservingWeightQuantizer):
            module.gradient = weight_gradient
        elif isinstance(module, PACT):
            module.gradient = pact_gradient
