"""Parameter groups and the optimizers that a config can name."""

from typing import Any

import torch
from torch import nn

from lightning_n2uq.quantizers import quantizer_parameters
from lightning_n2uq.utils.validation import check_choice

OPTIMIZERS = ("adam", "adamw", "sgd")


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, quantizer_lr_multiplier: float
) -> list[dict[str, Any]]:
    """Returns trainable parameters as `quantizer`, `weights` and `rest`; empty groups are left out.

    Thresholds and scales live on another scale than weights: they learn at `lr * quantizer_lr_multiplier`
    (one tenth in the paper's recipe) and never decay, since decay would pull widths below their floor.
    One-dimensional parameters (biases, normalisation, PReLU slopes) do not decay either. The groups carry a
    `name`, under which `LearningRateMonitor` logs them.
    """
    quantizer_names = {name for name, _ in quantizer_parameters(model)}
    members: dict[str, list[nn.Parameter]] = {"quantizer": [], "weights": [], "rest": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in quantizer_names:
            members["quantizer"].append(parameter)
        else:
            members["weights" if parameter.ndim > 1 else "rest"].append(parameter)
    groups = as_groups(members, lr, weight_decay, quantizer_lr_multiplier)
    return [group for group in groups if group["params"]]


def as_groups(
    members: dict[str, list[nn.Parameter]], lr: float, weight_decay: float, quantizer_lr_multiplier: float
) -> list[dict[str, Any]]:
    """Returns groups of these names; `quantizer` has a rate of its own, and only `weights` decay."""
    return [
        {
            "params": parameters,
            "name": name,
            "lr": lr * quantizer_lr_multiplier if name == "quantizer" else lr,
            "weight_decay": weight_decay if name == "weights" else 0.0,
        }
        for name, parameters in members.items()
    ]


def build_optimizer(
    name: str, groups: list[dict[str, Any]], *, lr: float, momentum: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Returns the optimizer; `momentum` is for sgd only, `betas` for adam and adamw only.

    Raises:
        ValueError: The name is unknown.
    """
    check_choice("optimizer", name, OPTIMIZERS)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=betas)
    return torch.optim.AdamW(groups, lr=lr, betas=betas)
