"""Which integers a map can hold, by channel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.integer_steps import GridCodes, IntAdd, IntMaxPool, SumPool
from lightning_n2uq.export.ir.shapes import Shape

Range = tuple[s.Array, s.Array]
"""The smallest and the largest number of each channel, int64 `[C]`."""


def infer_ranges(steps: Sequence[s.Step], shapes: dict[str, Shape]) -> dict[str, Range]:
    """Returns the ranges of all maps of integers by step name; others have none."""
    ranges: dict[str, Range] = {}
    for step in steps:
        found = _range(step, shapes, ranges)
        if found is not None:
            low, high = (np.broadcast_to(np.asarray(end, np.int64), shapes[step.name][:1]) for end in found)
            ranges[step.name] = low, high
    return ranges


def _range(
    step: s.Step, shapes: dict[str, Shape], ranges: dict[str, Range]
) -> tuple[s.Array | int, s.Array | int] | None:
    match step:
        case s.Input():
            # What float32 holds exactly.
            return {"uint8": (0, 255), "int32": (-s.EXACT_FLOAT32, s.EXACT_FLOAT32)}.get(step.dtype)
        case GridCodes():
            return step.low, step.high
        case s.Codes() | s.UniformCodes():
            return 0, step.levels
        case s.IntConv():
            return -step.bound(), step.bound()
    if not step.inputs or any(name not in ranges for name in step.inputs):
        return None
    low, high = ranges[step.inputs[0]]
    match step:
        case IntAdd():
            other_low, other_high = ranges[step.inputs[1]]
            return low + other_low, high + other_high
        case IntMaxPool():
            return low, high
        case SumPool():
            _, height, width = shapes[step.inputs[0]]
            return low * height * width, high * height * width
        case s.Flatten():
            pixels = int(np.prod(shapes[step.inputs[0]][1:]))
            return np.repeat(low, pixels), np.repeat(high, pixels)
    return None
