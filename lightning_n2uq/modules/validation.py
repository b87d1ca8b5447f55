"""Checks of the classifier's arguments: one line that names the argument, the value and what is allowed."""

import math
from collections.abc import Iterable


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    options = sorted(allowed)
    if value not in options:
        raise ValueError(f"{name}: got {value!r}, allowed {', '.join(options)}")


def check_integer(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raises ValueError unless `value` is an integer in `low..high` (no upper end if None)."""
    fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits or value < low or (high is not None and value > high):
        allowed = f"integers from {low}" if high is None else f"{low}..{high}" if high > low else str(low)
        raise ValueError(f"{name}: got {value!r}, allowed {allowed}")


def check_number(name: str, value: float, low: float, high: float = math.inf, open_low: bool = False) -> None:
    """Raises ValueError unless `low <= value <= high` (`low < value` if `open_low`); NaN never fits."""
    if not (low <= value <= high) or (open_low and value == low) or math.isinf(value):
        above = f"> {low:g}" if open_low else f">= {low:g}"
        allowed = above if math.isinf(high) else f"{above} and <= {high:g}"
        raise ValueError(f"{name}: got {value!r}, allowed {allowed}")
