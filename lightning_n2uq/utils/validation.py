"""Argument checks, with one form of message: `name: got VALUE, allowed is WHAT`."""

from __future__ import annotations

import math
from collections.abc import Iterable


def check(fits: bool, name: str, value: object, allowed: str) -> None:
    """Raises `ValueError` unless a value fits.

    Args:
        fits: The outcome of the caller's own test.
        name: The argument as the user writes it.
        value: What the user gave.
        allowed: The end of the message, with its verb: `is a positive number`, `are a, b`.
    """
    if not fits:
        raise ValueError(f"{name}: got {value!r}, allowed {allowed}")


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Returns `value` if it is one of `choices`; raises `ValueError` otherwise."""
    options = list(choices)
    check(value in options, name, value, f"are {', '.join(options)}")
    return value


def check_integer(name: str, value: int, low: int, high: int | None = None) -> int:
    """Returns `value` if it is an integer from `low` to `high`; raises `ValueError` otherwise.

    Args:
        name: The argument as the user writes it.
        value: What the user gave; a bool is no integer.
        low: The smallest integer allowed.
        high: The largest integer allowed; None for no limit.
    """
    fits = isinstance(value, int) and not isinstance(value, bool)
    fits = fits and low <= value and (high is None or value <= high)
    options = f"are integers from {low}" if high is None else f"is {low} to {high}"
    check(fits, name, value, f"is {low}" if low == high else options)
    return value


def check_number(
    name: str, value: float, low: float, high: float = math.inf, *, above: bool = False, below: bool = False
) -> float:
    """Returns `value` if it is a finite number from `low` to `high`; raises `ValueError` otherwise.

    Args:
        name: The argument as the user writes it.
        value: What the user gave; a bool and NaN are no numbers.
        low: The lower end of the range.
        high: The upper end of the range; infinite for no limit.
        above: Leaves out `low` itself.
        below: Leaves out `high` itself.
    """
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    fits = fits and low <= value <= high and not (above and value == low) and not (below and value == high)
    check(fits, name, value, f"is {_range(low, high, above, below)}")
    return value


def _range(low: float, high: float, above: bool, below: bool) -> str:
    if math.isinf(high):
        return f"above {low:g}" if above else f"{low:g} or more"
    if not above and not below:
        return f"{low:g} to {high:g}"
    start = f"above {low:g}" if above else f"{low:g} or more"
    return f"{start} and {'below' if below else 'up to'} {high:g}"
