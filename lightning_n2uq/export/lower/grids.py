"""Maps on grids: integers by thresholds, their sums, and pooling that stays among integers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lightning_n2uq.export.ir.description import FoldReport
from lightning_n2uq.export.ir.integer_steps import GridCodes, IntAdd, SumPool
from lightning_n2uq.export.ir.steps import Affine, Array
from lightning_n2uq.export.lower.builder import Builder
from lightning_n2uq.export.lower.deferred import Deferred, scale_and_shift
from lightning_n2uq.export.lower.fold import Conditions, fold_float, fold_integer
from lightning_n2uq.quantizers import UniformGrid


def folded(value: Deferred, conditions: Conditions) -> tuple[Array, Array | None]:
    """Returns thresholds `[C, n]` or `[1, n]` of the value's base, and its sign `[C]` or None.

    Raises:
        ValueError: The pending operations are not monotone.
    """
    table: Array
    if value.bound is not None:
        table, sign = fold_integer(value.pending, conditions, value.bound)
    else:
        table, sign = fold_float(value.pending, conditions, value.channels)
        if (table == table[:1]).all() and (sign == 1).all():
            table = table[:1]
    return table, None if (sign == 1).all() else sign.astype(table.dtype)


def fold_report(
    name: str, value: Deferred, signs: Array | None, explicit: int = 0, reason: str = ""
) -> FoldReport:
    """Returns what became of the operations in front of the quantizer `name`."""
    turned = 0 if signs is None else int((signs < 0).sum())
    return FoldReport(name, len(value.pending), explicit, value.bound is not None, turned, reason)


def grid_codes(builder: Builder, value: Deferred, grid: UniformGrid, name: str) -> tuple[str, float]:
    """Adds the integers of a value on a grid; returns the step's name and the distance of two levels.

    Raises:
        ValueError: The grid has no finite range yet, or the value's operations are not monotone.
    """
    distance = float(grid.step())
    if not bool(grid.initialized):
        raise ValueError(f"{name}: its grid was never initialised; train the network first")
    if not (np.isfinite(distance) and distance > 0):
        raise ValueError(f"{name}: grid step {distance}; allowed is a positive number")
    places = np.arange(grid.low + 1, grid.high + 1)
    conditions = Conditions(lambda y: np.rint(y / distance) >= places, (places - 0.5) * distance)
    table, signs = folded(value, conditions)
    codes = builder.place(GridCodes(name, (value.base,), table, signs, grid.low))
    builder.folds.append(fold_report(codes, value, signs))
    return codes, distance


def on_a_grid(builder: Builder, value: Deferred, grid: UniformGrid, name: str) -> Deferred:
    """Returns a value on a grid: the integers of `grid_codes`, to be multiplied with the step."""
    codes, distance = grid_codes(builder, value, grid, name)
    return Deferred(codes, value.channels, np.full(value.channels, grid.high)).affine(distance)


def add_on_grid(
    builder: Builder, branches: tuple[Deferred, Deferred], grid: UniformGrid, name: str
) -> Deferred:
    """Adds two values, both on the grid; returns the sum, clipped to the grid, times the step."""
    ends = zip(branches, ("branch", "shortcut"), strict=True)
    left, right = (grid_codes(builder, value, grid, f"{name}.{end}")[0] for value, end in ends)
    bound = np.full(branches[0].channels, 2 * grid.high)
    total = builder.output(IntAdd(f"{name}.add", (left, right)), bound)
    return total.clamp(float(grid.low), float(grid.high)).affine(float(grid.step()))


def on_grid(builder: Builder, value: Deferred) -> bool:
    """Returns whether a value is integers of a grid times a positive step, and nothing else."""
    base = next(step for step in builder.steps if step.name == value.base)
    if not isinstance(base, GridCodes) or len(value.pending) != 1:
        return False
    (step,) = value.pending
    return isinstance(step, Affine) and not scale_and_shift(step)[1].any()


def of_codes(builder: Builder, value: Deferred) -> bool:
    """Returns whether a value is unsigned integers of a grid times a step: pooling may take the integers."""
    base = next(step for step in builder.steps if step.name == value.base)
    return on_grid(builder, value) and isinstance(base, GridCodes) and base.low == 0


def sum_pool(builder: Builder, value: Deferred, name: str) -> Deferred:
    """Adds the sum over height and width; the mean's divisor goes into the pending scale."""
    assert value.bound is not None
    _, height, width = builder.shapes[value.base]
    total = builder.output(SumPool(name, (value.base,)), value.bound * height * width)
    return replace(total, pending=value.pending).affine(1.0 / (height * width))
