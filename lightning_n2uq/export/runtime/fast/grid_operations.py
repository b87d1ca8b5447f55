"""The quickest operation that computes a step's codes on a grid, and its numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.integer_steps import GridCodes
from lightning_n2uq.export.runtime import numpy_engine
from lightning_n2uq.export.runtime.fast import loops
from lightning_n2uq.export.runtime.fast.grid_lines import grid_line
from lightning_n2uq.export.runtime.fast.ranges import Range

_TABLE = 1024
"""The most values of a channel that a table is made for."""

Operation = tuple[int, s.Array, int]


def grid_operation(step: GridCodes, channels: int, range_: Range | None, period: int) -> Operation:
    """Returns kind, numbers and count for `loops`: a line, a table or a search.

    Args:
        step: The step, whose sign has been dealt with.
        channels: Number of channels.
        range_: Of the input, times the sign; None for floats.
        period: Values after which per-channel numbers repeat.
    """
    line = grid_line(step, channels, range_)
    if line is not None and line.slope.dtype == np.float32:
        return loops.GRID, np.tile(line.rows, (1, period // channels)), 0
    if range_ is not None and int((range_[1] - range_[0]).max()) < _TABLE:
        return _table(step, channels, range_)
    if line is not None:
        rows = np.tile(line.rows, (1, period // channels))
        return loops.GRID_DOUBLE, np.ascontiguousarray(rows).reshape(-1).view(np.float32), 0
    number = 2 ** step.levels.bit_length() - 1
    # Nothing exceeds infinity: thresholds that fill up are never passed.
    filled = np.full((channels, number), np.float32(np.inf))
    filled[:, : step.levels] = step.thresholds
    return loops.GRID_SEARCH, np.append(np.float32(step.low), filled), number


def _table(step: GridCodes, channels: int, range_: Range) -> Operation:
    first, last = int(range_[0].min()), int(range_[1].max())
    number = (last - first + 2) // 2 * 2  # a whole number of float32s
    x = np.broadcast_to(np.arange(first, first + number), (1, channels, number)).astype(step.thresholds.dtype)
    values = numpy_engine.run_step(replace(step, sign=None), x[..., None])[0, :, :, 0].astype(np.int16)
    return loops.GRID_TABLE, np.append(np.float32(first), values.reshape(-1).view(np.float32)), number
