"""Switches for the points where the published N2UQ code and the paper, or our defaults, differ.

- Learning rate of quantizer parameters: all at a tenth by default; `published_parameter_groups` leaves some
  at the full rate, as the published filter does.
- Schedule: linear, per step, 0 after the last one by default; `published_schedule_factor` steps per epoch and
  runs the last epoch at 0.
- Comparison with a threshold, gradient of the weights, gradient of PACT's clip: `set_numerics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_n2uq.backbones.mobilenet_v2 import MobileNetV2
from lightning_n2uq.interop import official_names
from lightning_n2uq.modules.optimizers import as_groups
from lightning_n2uq.quantizers import PACT, EntropyPreservingWeightQuantizer, LearnableThresholdQuantizer
from lightning_n2uq.utils.validation import check_choice

QUANTIZER_LR = 0.1
_SLOW = ("quan1.a", "quan2.a", "scale", "start")
_SLOW_IN_MOBILENET = (*_SLOW, "quan3.a")


def published_parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Returns the three groups of the published code, which picks them by substrings of its parameter names.

    Its filter misses `quan3.a` in ResNets (the third quantizer of a bottleneck) and `downsample.0.a`: those
    widths learn at the full rate. Only 4-D weights decay, so that the last linear layer does not.

    Args:
        model: A network of the paper, whose published names `lightning_n2uq.interop` knows.
        lr: The learning rate of weights and of the rest; quantizer parameters get a tenth.
        weight_decay: The decay of convolution weights.

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
    return as_groups(members, lr, weight_decay, QUANTIZER_LR)


def published_schedule_factor(total_steps: float, epochs: int | None) -> Callable[[int], float]:
    """Returns `factor(step) = 1 - (epoch + 1) / epochs`: the published schedule steps before each epoch.

    The first epoch already runs below the base rate, the last one at 0.

    Args:
        total_steps: The number of optimizer steps in the whole run.
        epochs: The number of epochs in the whole run.

    Raises:
        ValueError: The length is not known in epochs.
    """
    if epochs is None or epochs < 1 or not math.isfinite(total_steps):
        raise ValueError("schedule: got 'published', which needs trainer.max_epochs to be set")
    steps_per_epoch = max(1, math.ceil(total_steps / epochs))
    return lambda step: max(0.0, 1.0 - (step // steps_per_epoch + 1) / epochs)


def set_numerics(
    model: nn.Module,
    threshold_comparison: str = ">",
    weight_gradient: str = "scaled",
    pact_gradient: str = "paper",
) -> None:
    """Sets the numerical switches of every N2UQ and PACT quantizer in `model`.

    Args:
        model: A network with any quantizers.
        threshold_comparison: `>` (the published code) or `>=` (an input at a threshold gets the upper code).
        weight_gradient: The gradient of weights: `scaled` (the published code's `1/S`) or `straight_through`.
        pact_gradient: The gradient of PACT's clip: `paper` or `published`.

    Raises:
        ValueError: A value that is not allowed.
    """
    check_choice("threshold_comparison", threshold_comparison, (">", ">="))
    check_choice("weight_gradient", weight_gradient, ("scaled", "straight_through"))
    check_choice("pact_gradient", pact_gradient, ("paper", "published"))
    for module in model.modules():
        if isinstance(module, LearnableThresholdQuantizer):
            module.comparison = threshold_comparison
        elif isinstance(module, EntropyPreservingWeightQuantizer):
            module.gradient = weight_gradient
        elif isinstance(module, PACT):
            module.gradient = pact_gradient
