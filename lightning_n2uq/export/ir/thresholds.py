"""The last number that does not pass a monotone test, found by bisection: thresholds without an inverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_n2uq.export.ir.steps import UniformCodes

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]

_MAX_KEY = int(np.array(np.finfo(np.float32).max).view(np.int32))


def last_failing(passes: Callable[[Int64], Bool], low: Int64, high: Int64) -> Int64:
    """Returns elementwise the largest integer in `low .. high` that does not pass; `low` is taken to fail."""
    while (active := low < high).any():
        middle = low + (high - low + 1) // 2
        passed = passes(middle)
        high = np.where(active & passed, middle - 1, high)
        low = np.where(active & ~passed, middle, low)
    return low


def near(passes: Callable[[Int64], Bool], low: Int64, high: Int64, guess: Int64) -> tuple[Int64, Int64]:
    """Returns narrower limits for `last_failing` around a guess, and those given where the guess is wrong."""
    below, above = np.clip(guess - 4, low, high), np.clip(guess + 4, low, high)
    wrong = ((below > low) & passes(below)) | ((above < high) & ~passes(np.minimum(above + 1, high)))
    return np.where(wrong, low, below), np.where(wrong, high, above)


def key_from_float(values: NDArray[np.float64]) -> Int64:
    """Returns the rank of the float32 next to each value; that of zero for NaN."""
    with np.errstate(over="ignore"):
        numbers = np.nan_to_num(values, nan=0.0).astype(np.float32)
    magnitude = np.abs(numbers).view(np.int32).astype(np.int64)
    return np.where(numbers < 0, -magnitude, magnitude)


def float_from_key(key: Int64) -> Float32:
    """Returns the float32 of a rank: 0 is zero, 1 the smallest positive number, -1 the largest negative."""
    magnitude = np.abs(key).astype(np.int32).view(np.float32)
    value: Float32 = np.where(key < 0, -magnitude, magnitude).astype(np.float32)
    return value


def last_failing_float(
    passes: Callable[[Float32], Bool], shape: tuple[int, int], guess: NDArray[np.float64] | None = None
) -> Float32:
    """Returns elementwise the largest finite float32 that does not pass, minus infinity where all pass.

    Args:
        passes: The test, monotone.
        shape: Of the result.
        guess: About what it will be, which makes the search shorter; the result does not depend on it.
    """
    low, high = np.full(shape, -_MAX_KEY - 1), np.full(shape, _MAX_KEY)

    def test(middle: Int64) -> Bool:
        return passes(float_from_key(middle))

    if guess is not None:
        low, high = near(test, low, high, key_from_float(guess))
    key = last_failing(test, low, high)
    finite = float_from_key(np.maximum(key, -_MAX_KEY))
    return np.where(key < -_MAX_KEY, np.float32(-np.inf), finite)


def uniform_thresholds(step: UniformCodes) -> Float32:
    """Returns, as `[1, n]`, the largest float32 whose code is below `k`, for `k = 1 .. n`."""
    places = np.arange(1, step.levels + 1)[None]
    divisor, offset = np.float32(step.step), np.float32(step.offset)

    def passes(x: Float32) -> Bool:
        with np.errstate(over="ignore"):
            passed: Bool = np.rint((x - offset) / divisor) >= places
        return passed

    return last_failing_float(passes, (1, step.levels))


def at_least(thresholds: NDArray[Any]) -> Float32:
    """Returns thresholds for `>=` that pass the same values as the given ones do for `>`.

    Integers: the next integer. Float32: the next float32; behind the largest comes infinity.
    """
    if np.issubdtype(thresholds.dtype, np.integer):
        return (thresholds + 1).astype(np.float32)
    with np.errstate(over="ignore"):
        behind: Float32 = np.nextafter(thresholds, np.float32(np.inf))
    return behind
