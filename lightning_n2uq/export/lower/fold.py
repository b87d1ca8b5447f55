"""Thresholds moved through the operations in front of a quantizer.

A quantizer counts thresholds: `q = #{k : f(x) > T_k}`, `f` being a scale, batch norm, biases, PReLU, ...
Where `f` increases, `f(x) > T_k` is the same as `x > t_k`, `t_k` being the last `x` that does not pass; where
it decreases, the same holds for `-x`. That `x` is found by bisection over all integers in the accumulator's
range, or over all finite float32 numbers: no inverse of `f` is needed, ties and flat pieces come out right,
and `f` is evaluated in float64 with every operation monotone, so that the result holds for every input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_n2uq.export.ir.steps import ChannelStep
from lightning_n2uq.export.ir.thresholds import Bool, Float32, Int64, last_failing, last_failing_float, near
from lightning_n2uq.export.lower.deferred import Float64, directions, evaluate, invert


@dataclass(frozen=True)
class Conditions:
    """A row of conditions on a real number, each harder to pass than the one before.

    Attributes:
        passes: Whether the values `[C, n]` pass the conditions `1 .. n`; monotone in the value.
        places: About where each is reached, `[n]`, which makes searches shorter and changes no result.
    """

    passes: Callable[[Float64], Bool]
    places: Float64

    @property
    def count(self) -> int:
        """Number of conditions."""
        return self.places.size


def above(thresholds: Float64 | Conditions) -> Conditions:
    """Returns the conditions `x > thresholds`, `[n]`, non-decreasing; other conditions as they are."""
    if isinstance(thresholds, Conditions):
        return thresholds
    return Conditions(lambda y: y > thresholds, thresholds)


def fold_integer(
    steps: tuple[ChannelStep, ...], thresholds: Float64 | Conditions, bound: Int64
) -> tuple[NDArray[np.int32], Int64]:
    """Derives integer thresholds of accumulators.

    Args:
        steps: The map, monotone in every channel.
        thresholds: What the map's output has to exceed, `[n]`, non-decreasing; or other conditions.
        bound: Accumulators of each channel lie in `-bound .. bound`; `[C]`.

    Returns:
        `[C, n]` in `-bound - 1 .. bound` (both ends: always or never passed), and the sign `[C]`, 1 or -1,
        by which accumulators are multiplied first.

    Raises:
        ValueError: The map is not monotone in some channel.
    """
    sign, test = _signs(steps, bound.size), above(thresholds)
    low = np.repeat(-bound[:, None] - 1, test.count, 1)
    high = np.repeat(bound[:, None], test.count, 1)

    def passes(x: Int64) -> Bool:
        return test.passes(evaluate(steps, (x * sign[:, None]).astype(np.float64)))

    guess = np.clip(np.nan_to_num(_guess(steps, test.places, sign)), low, high).astype(np.int64)
    return last_failing(passes, *near(passes, low, high, guess)).astype(np.int32), sign


def fold_float(
    steps: tuple[ChannelStep, ...], thresholds: Float64 | Conditions, channels: int
) -> tuple[Float32, Int64]:
    """Derives float32 thresholds of float32 values; arguments and errors as for `fold_integer`.

    Returns:
        `[C, n]` float32 numbers and the sign `[C]`. A threshold that every finite value passes is minus
        infinity, one that none passes is the largest float32: an infinite input counts as beyond all
        finite ones.
    """
    sign, test = _signs(steps, channels), above(thresholds)

    def passes(x: Float32) -> Bool:
        with np.errstate(over="ignore", invalid="ignore"):
            return test.passes(evaluate(steps, x.astype(np.float64) * sign[:, None]))

    return last_failing_float(passes, (channels, test.count), _guess(steps, test.places, sign)), sign


def _guess(steps: tuple[ChannelStep, ...], places: Float64, sign: Int64) -> Float64:
    """Returns about where the conditions are reached, `[C, n]`."""
    targets = np.broadcast_to(places, (sign.size, places.size))
    return invert(steps, targets) * sign[:, None]


def _signs(steps: tuple[ChannelStep, ...], channels: int) -> Int64:
    sign = directions(steps, channels).astype(np.int64)
    if (sign == 0).any():
        raise ValueError(f"steps: {int((sign == 0).sum())} of {channels} channels are not monotone")
    return sign
