"""Points of a run in fractions, epochs or steps, and the curves between two points."""

from __future__ import annotations

import math
from collections.abc import Callable

from lightning.pytorch import Trainer

UNITS = ("fraction", "epochs", "steps")

_SMALLEST = 1e-3  # where an exponential decay is cut off and meets zero

CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "exponential": lambda done: (_SMALLEST**done - _SMALLEST) / (1.0 - _SMALLEST),
}
"""Curves from 1 to 0 by name, as functions of the share done, `0 .. 1`."""


def decay(curve: str, step: int, begin: float, end: float) -> float:
    """Value at optimizer step `step` of a curve that is 1 up to `begin` and exactly 0 from `end` on."""
    if step >= end:
        return 0.0
    if step <= begin:
        return 1.0
    return CURVES[curve]((step - begin) / (end - begin))


def check_curve(name: str, value: str) -> str:
    """Returns the name of a curve; `ValueError` for another one."""
    if value not in CURVES:
        raise ValueError(f"{name}: got {value!r}, allowed are {', '.join(CURVES)}")
    return value


def check_unit(value: str) -> str:
    """Returns a unit of time; `ValueError` for another one."""
    if value not in UNITS:
        raise ValueError(f"unit: got {value!r}, allowed are {', '.join(UNITS)}")
    return value


def check_point(name: str, value: float, unit: str) -> float:
    """Returns a point in time, not negative and up to 1 for a fraction; else `ValueError`."""
    highest = 1.0 if unit == "fraction" else math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= highest:
        allowed = "0 to 1 (unit is 'fraction')" if unit == "fraction" else "0 or more"
        raise ValueError(f"{name}: got {value!r}, allowed is {allowed}")
    return float(value)


def check_interval(start: float, end: float, unit: str) -> None:
    """Raises `ValueError` unless `start` and `end` are points in time in this order."""
    check_point("start", start, unit)
    check_point("end", end, unit)
    if start > end:
        raise ValueError(f"start: got {start}, allowed is at most end, which is {end}")


def steps_of(trainer: Trainer, unit: str) -> float:
    """Optimizer steps in one unit of time of this run.

    Raises:
        ValueError: The run has no known length, or its epochs have none.
    """
    if unit == "steps":
        return 1.0
    total = trainer.estimated_stepping_batches
    if unit == "fraction":
        if not math.isfinite(total) or total < 0:
            raise ValueError("unit: got 'fraction', which needs trainer.max_epochs or trainer.max_steps")
        return float(total)
    if not math.isfinite(trainer.num_training_batches):
        raise ValueError("unit: got 'epochs', which needs data of known length; use 'steps'")
    return float(math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))
