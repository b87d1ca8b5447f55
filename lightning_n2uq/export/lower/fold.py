"""Thresholds moved through the operations in front of a quantizer.

A quantizer counts thresholds: `q = #{k : f(x) > T_k}`, `f` being a scale, batch norm, biases, PReLU, ...
Where `f` increases, `f(x) > T_k` is the same as `x > t_k`, `t_k` being the last `x` that does not pass; where
it decreases, the same holds for `-x`. That `x` is found by bisection over all integers in the accumulator's
range, or over all finite float32 numbers: no inverse of `f` is needed, ties and flat pieces come out right,
and `f` is evaluated in float64 with every operation monotone, so that the result holds for every input.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lightning_n2uq.export.lower.deferred import Float64, Stage, directions, evaluate

Int64 = NDArray[np.int64]

_MAX_KEY = int(np.array(np.finfo(np.float32).max).view(np.int32))


def float_from_key(key: Int64) -> NDArray[np.float32]:
    """The float32 with the given rank: 0 is zero, 1 the smallest positive number, -1 the largest negative."""
    magnitude = np.abs(key).astype(np.int32).view(np.float32)
    value: NDArray[np.float32] = np.where(key < 0, -magnitude, magnitude).astype(np.float32)
    return value


def fold_integer(
    stages: tuple[Stage, ...], thresholds: Float64, bound: Int64
) -> tuple[NDArray[np.int32], Int64]:
    """Integer thresholds of accumulators.

    Args:
        stages: the map, monotone in every channel.
        thresholds: `[n]`, non-decreasing.
        bound: `[C]`, accumulators lie in `-bound .. bound`.

    Returns:
        `[C, n]` in `-bound - 1 .. bound` (both ends: always or never passed), and the sign `[C]`, 1 or -1,
        by which accumulators are multiplied first.

    Raises:
        ValueError: the map is not monotone in some channel.
    """
    sign = _signs(stages, bound.size)
    low = np.repeat(-bound[:, None] - 1, thresholds.size, 1)
    high = np.repeat(bound[:, None], thresholds.size, 1)

    def passes(x: Int64) -> NDArray[np.bool_]:
        return evaluate(stages, (x * sign[:, None]).astype(np.float64)) > thresholds

    return _last_failing(passes, low, high).astype(np.int32), sign


def fold_float(
    stages: tuple[Stage, ...], thresholds: Float64, channels: int
) -> tuple[NDArray[np.float32], Int64]:
    """Float32 thresholds of float32 values; arguments as for `fold_integer`.

    Returns:
        `[C, n]` float32 numbers and the sign `[C]`. A threshold that every finite value passes is minus
        infinity, one that none passes is the largest float32: an infinite input counts as beyond all
        finite ones.
    """
    sign = _signs(stages, channels)

    def passes(x: NDArray[np.float32]) -> NDArray[np.bool_]:
        with np.errstate(over="ignore", invalid="ignore"):
            return evaluate(stages, x.astype(np.float64) * sign[:, None]) > thresholds

    return last_failing_float(passes, (channels, thresholds.size)), sign


def last_failing_float(
    passes: Callable[[NDArray[np.float32]], NDArray[np.bool_]], shape: tuple[int, int]
) -> NDArray[np.float32]:
    """Elementwise the largest finite float32 that does not pass, minus infinity where all pass."""
    low, high = np.full(shape, -_MAX_KEY - 1), np.full(shape, _MAX_KEY)
    key = _last_failing(lambda middle: passes(float_from_key(middle)), low, high)
    finite = float_from_key(np.maximum(key, -_MAX_KEY))
    return np.where(key < -_MAX_KEY, np.float32(-np.inf), finite)


def _signs(stages: tuple[Stage, ...], channels: int) -> Int64:
    sign = directions(stages, channels).astype(np.int64)
    if (sign == 0).any():
        raise ValueError(f"stages: {int((sign == 0).sum())} of {channels} channels are not monotone")
    return sign


def _last_failing(passes: Callable[[Int64], NDArray[np.bool_]], low: Int64, high: Int64) -> Int64:
    """Largest integer that does not pass, between `low` (taken to fail) and `high`, elementwise."""
    while (active := low < high).any():
        middle = low + (high - low + 1) // 2
        passed = passes(middle)
        high = np.where(active & passed, middle - 1, high)
        low = np.where(active & ~passed, middle, low)
    return low
