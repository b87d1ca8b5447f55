"""Is a checkpoint's network the model's? Shapes do not tell: 2 and 4 bits have weights of one shape."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

TRAINING_ONLY = frozenset(
    {
        "image_size", "label_smoothing", "teacher", "temperature", "hard_label_weight", "optimizer", "lr",
        "weight_decay", "momentum", "betas", "schedule", "warmup_steps", "quantizer_lr_multiplier",
        "parameter_groups", "weight_gradient", "pact_gradient", "init_from", "memory_format",
    }
)  # fmt: skip
"""Arguments that change how a network is trained, or how fast, not what it computes; others are compared."""


def check_same_network(cls: type, wanted: Mapping[str, Any], saved: Mapping[str, Any], argument: str) -> None:
    """Refuses a checkpoint whose network computes something else than the model that it is loaded into.

    Args:
        cls: The LightningModule; an argument that a checkpoint lacks had the default of its constructor.
        wanted: The model's arguments.
        saved: The checkpoint's hyperparameters.
        argument: The user's name for the checkpoint, used in the error.

    Raises:
        ValueError: An argument that changes the function differs; the message names all that do.
    """
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.default is not parameter.empty
    }
    names = [name for name in wanted if name in defaults and name not in TRAINING_ONLY]
    pairs = [(name, saved.get(name, defaults[name]), wanted[name]) for name in names]
    different = [pair for pair in pairs if (pair[1] or None) != (pair[2] or None)]  # {} and None: no keywords
    if different:
        was = ", ".join(f"{name} {before!r}" for name, before, _ in different)
        now = ", ".join(f"{name} {after!r}" for name, _, after in different)
        raise ValueError(f"{argument}: the checkpoint's network has {was}, but the model has {now}")
