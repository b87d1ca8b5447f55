"""Learning-rate factors as plain functions of the optimizer step."""

import math
from collections.abc import Callable

from lightning_n2uq.utils.validation import check, check_choice

SCHEDULES = ("linear", "cosine", "constant")


def schedule_factor(name: str, total_steps: float, warmup_steps: int = 0) -> Callable[[int], float]:
    """Returns `factor(step)`, which multiplies the base learning rate at optimizer step `step`.

    `linear` is `1 - step/total` and so reaches 0 after the last step, not at it: every step learns
    something. `cosine` is the half period of a cosine over the same range. Warm-up rises linearly from
    `1/warmup_steps` and the rest of the schedule spans the steps that remain.

    The result is a function and not an object with fields: `LambdaLR` would store an object's fields in the
    checkpoint, and a run resumed with more epochs would keep the old length.

    Args:
        name: One of `SCHEDULES`.
        total_steps: The number of optimizer steps in the whole run.
        warmup_steps: The number of warm-up steps at the start, below `total_steps`.

    Raises:
        ValueError: The name is unknown, or the length does not fit the schedule.
    """
    check_choice("schedule", name, SCHEDULES)
    fits = 0 <= warmup_steps < max(total_steps, 1)
    check(fits, "warmup_steps", warmup_steps, f"is 0 to {total_steps - 1} (steps of the run - 1)")
    if name != "constant" and not math.isfinite(total_steps):
        raise ValueError(
            f"schedule: got {name!r}, which needs trainer.max_epochs or trainer.max_steps to be set"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if name == "constant":
            return 1.0
        # Lightning asks for one factor more than there are steps.
        done = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
        return 1.0 - done if name == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    return factor
