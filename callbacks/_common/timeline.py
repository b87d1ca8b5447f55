"""Points of a run in fractions, epochs or steps, and the curves between two points."""

from __future__ import annotations

import math
from collections.abc import Callable

from lightning.pytorch import Trainer

from lightning_n2uq.utils.validation import check_choice, check_number

UNITS = ("fraction", "epochs", "steps")

_SMALLEST = 1e-3  # where an exponential decay is cut off and meets zero

CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "exponential": lambda done: (_SMALLEST**done - _SMALLEST) / (1.0 - _SMALLEST),
}
"""Curves from 1 to 0 by name, as functions of the share done, `0 .. 1`."""


def decay(curve: str, step: int, begin: float, end: float) -> float:
    """Returns a curve's value at optimizer step `step`; it is 1 up to `begin` and exactly 0 from `end` on."""
    if step >= end:
        return 0.0
    if step <= begin:
        return 1.0
    return CURVES[curve]((step - begin) / (end - begin))


def check_point(name: str, value: float, unit: str) -> float:
    """Returns a point in time, not negative and up to 1 for a fraction; raises `ValueError` otherwise."""
    return float(check_number(name, value, 0, 1 if unit == "fraction" else math.inf))


def check_interval(start: float, end: float, unit: str) -> None:
    """Raises `ValueError` unless `unit` is one and `start` and `end` are points in time in this order."""
    check_choice("unit", unit, UNITS)
    check_point("start", start, unit)
    check_point("end", end, unit)
    if start > end:
        raise ValueError(f"start: got {start}, allowed is at most end, which is {end}")


def steps_of(trainer: Trainer, unit: str) -> float:
    """Returns the number of optimizer steps in one unit of time of this run.

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
