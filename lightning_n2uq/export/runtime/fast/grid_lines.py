"""Codes on a grid as a line per channel: one product and one rounding instead of up to 255 comparisons.

Thresholds that lie evenly are those of a rounded line. The line with the widest margin is searched for, and
taken only if it gives the codes of the thresholds on both sides of each: both only ever increase, so that it
then gives them everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.integer_steps import GridCodes
from lightning_n2uq.export.runtime import numpy_engine
from lightning_n2uq.export.runtime.fast.ranges import Range
from lightning_n2uq.ops.backends.common.jit import compiled

_SHRINKS = 32
"""Thirds by which a slope's interval shrinks."""


@dataclass(frozen=True)
class Line:
    """`min(max(rint(x * slope + start), low), high)` by channel, computed in the dtype of the slope.

    Attributes:
        slope: `[C]` float32 or float64.
        start: Likewise.
        low: Likewise, smallest values.
        high: Likewise, largest values.
    """

    slope: s.Array
    start: s.Array
    low: s.Array
    high: s.Array

    @property
    def rows(self) -> s.Array:
        """Returns the numbers as `[4, C]`."""
        return np.stack([self.slope, self.start, self.low, self.high])

    def __call__(self, x: s.Array) -> s.Array:
        """Returns the values for `x` `[C, m]`."""
        slope, start, low, high = self.rows[:, :, None]
        with np.errstate(invalid="ignore", over="ignore"):
            rounded = np.rint(x.astype(slope.dtype) * slope + start)
        values: s.Array = np.where(rounded > low, np.minimum(rounded, high), low)
        return values


def grid_line(step: GridCodes, channels: int, range_: Range | None) -> Line | None:
    """Returns the line of a step, in float32 if that is exact, else in float64 if that is; None if neither.

    The sign of the step is not a part of it.

    Args:
        step: The step.
        channels: Number of channels.
        range_: Of the input times the sign; None for floats.
    """
    before = np.broadcast_to(step.thresholds, (channels, step.levels))
    if range_ is None:
        after, both = np.nextafter(before, np.float32(np.inf)), np.array([-np.inf, np.inf], np.float32)
        points = np.concatenate([before, after, np.tile(both, (channels, 1))], 1)
        low, high = np.full((2, channels, 1), [[[-np.inf]], [[np.inf]]])
    else:
        low, high = (np.asarray(end, np.int64)[:, None] for end in range_)
        after = before.astype(np.int64) + 1
        points = np.clip(np.concatenate([before, after, low, high], 1), low, high)
    first, last = (before < low).sum(1), (before < high).sum(1)
    slope, start = np.empty((2, channels))
    fit_lines(0, channels, before.astype(np.float64), after.astype(np.float64), first, last, slope, start)
    ends = first + float(step.low), last + float(step.low)
    exact = Line(slope, start + step.low, *ends)
    single = Line(*exact.rows.astype(np.float32))
    expected = _values(step, points)
    for line in (single, exact):
        if np.array_equal(line(points), expected):
            return line
    return None


def _values(step: GridCodes, points: s.Array) -> s.Array:
    """Returns the step's values of points `[C, m]`, without its sign."""
    x = points.astype(step.thresholds.dtype)[None, :, :, None]
    values: s.Array = numpy_engine.run_step(replace(step, sign=None), x)[0, :, :, 0]
    return values


@compiled
def fit_lines(
    begin: int,
    end: int,
    before: s.Array,
    after: s.Array,
    first: s.Array,
    last: s.Array,
    slope: s.Array,
    start: s.Array,
) -> None:
    """Writes for channels `begin .. end - 1` the line farthest from the thresholds on either side.

    Args:
        begin: The first channel.
        end: The channel behind the last one.
        before: The thresholds `[C, n]`: the last values in front of each.
        after: The first values behind each.
        first: Thresholds from here on count, by channel.
        last: Thresholds from here on do not.
        slope: Is written.
        start: Likewise.
    """
    for c in range(begin, end):
        count = last[c] - first[c]
        low, high = 1.0, 1.0
        if count > 1:
            wide = before[c, last[c] - 1] - before[c, first[c]]
            # Each end is known to one step of the input.
            near = after[c, last[c] - 1] - before[c, last[c] - 1] + after[c, first[c]] - before[c, first[c]]
            low, high = (count - 1) / (wide + near), (count - 1) / max(wide - near, near / 4)
        lower_margin, tried, above, below = -np.inf, low, 0.0, 0.0
        for turn in range(2 * _SHRINKS + 1):
            # Two slopes in turn, and the middle of what is left at the end.
            lower, upper = low + (high - low) / 3, high - (high - low) / 3
            tried = lower if turn % 2 == 0 else upper
            tried = (low + high) / 2 if turn == 2 * _SHRINKS else tried
            above, below = np.inf, -np.inf
            for k in range(first[c], last[c]):
                above = min(above, k + 0.5 - tried * before[c, k])
                below = max(below, k + 0.5 - tried * after[c, k])
            margin = above - below
            if turn % 2 == 0:
                lower_margin = margin
            elif lower_margin < margin:
                low = lower
            else:
                high = upper
        slope[c] = tried if count > 0 else 0.0
        start[c] = (above + below) / 2 if count > 0 else first[c]
