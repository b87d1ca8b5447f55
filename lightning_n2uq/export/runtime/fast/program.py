"""Elementwise steps between two layers as one program for `loops`: operands, registers, repeated numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.integer_steps import GridCodes, IntAdd
from lightning_n2uq.export.ir.steps import Array
from lightning_n2uq.export.runtime.fast import loops
from lightning_n2uq.export.runtime.fast.grid_operations import grid_operation
from lightning_n2uq.export.runtime.fast.ranges import Range

_SHORTEST_PERIOD = 512
"""Per-channel numbers are repeated up to here, so that the innermost loops are not too short."""
_COUNTED = (3, 5, 10, 15)
"""Numbers of thresholds that are all compared; more of them are searched."""

Operation = tuple[int, Array, int]
"""Kind, numbers and count, as in a row of a program."""

NOTHING: Array = np.zeros(0, np.float32)


class TooLargeError(Exception):
    """A program would need more registers than there are."""


@dataclass
class Program:
    """A program for `loops.run_program`.

    Attributes:
        code: Rows of operations, int32.
        params: Per-channel numbers, float32.
        channels: Number of channels.
        period: Values after which per-channel numbers repeat.
        operands: Names of the maps that it reads and writes, in the order of their numbers from
            `loops.REGISTERS` on; for the products of a `SplitConv` see `products`.
    """

    code: Array
    params: Array
    channels: int
    period: int
    operands: list[str]


def products(name: str) -> tuple[str, str]:
    """Returns the operands' names of a `SplitConv`'s products: those of high inputs, and that of low ones."""
    return f"{name}/high", f"{name}/low"


@dataclass
class ProgramBuilder:
    """Makes a program of elementwise steps.

    Attributes:
        channels: Number of channels.
        stored: Names of the steps whose values are needed outside.
        loads: For names of inputs that are maps of bytes, the operation that loads them.
        last: A step whose value is left in register 0, or None.
        ranges: Of maps of integers, by name.
    """

    channels: int
    stored: set[str]
    loads: Mapping[str, int]
    last: str | None = None
    ranges: Mapping[str, Range] = field(default_factory=dict)
    _rows: list[tuple[int, ...]] = field(default_factory=list)
    _params: list[Array] = field(default_factory=lambda: [np.zeros(1, np.float32)])
    _operands: list[str] = field(default_factory=list)
    _registers: dict[str, int] = field(default_factory=dict)

    def build(self, members: Sequence[s.Step]) -> Program:
        """Returns the program that computes `members`, elementwise steps in order.

        Raises:
            TooLargeError: There are too few registers.
        """
        for index, step in enumerate(members):
            self._add(step, {name for later in members[index + 1 :] for name in later.inputs})
        code = np.array(self._rows, np.int32).reshape(-1, 6)
        return Program(code, np.concatenate(self._params), self.channels, self._period, self._operands)

    @property
    def _period(self) -> int:
        return self.channels * max(1, -(-_SHORTEST_PERIOD // self.channels))

    def _add(self, step: s.Step, needed: set[str]) -> None:
        inputs = products(step.name) if isinstance(step, s.SplitConv) else step.inputs
        left, *rest = [self._source(name) for name in inputs]
        operations = self._operations(step)
        target = self._target(step)
        # What leads up to codes needs a place for floats.
        bytes_only = isinstance(step, s.Codes) and not isinstance(step, GridCodes)
        between = self._free() if bytes_only and len(operations) > 1 else target
        for index, (op, numbers, count) in enumerate(operations):
            place = target if index == len(operations) - 1 else between
            self._rows.append((op, place, left, rest[0] if rest else -1, self._keep(numbers), count))
            left = between
        if isinstance(step, GridCodes):
            self._rows.append((loops.PACK, self._operand(step.name), target, -1, 0, 0))
        for name in [name for name in self._registers if name not in needed and name != self.last]:
            del self._registers[name]

    def _source(self, name: str) -> int:
        if name in self._registers:
            return self._registers[name]
        operand = self._operand(name)
        if name not in self.loads:
            return operand
        self._registers[name] = self._free()
        self._rows.append((self.loads[name], self._registers[name], operand, -1, 0, 0))
        return self._registers[name]

    def _operand(self, name: str) -> int:
        if name not in self._operands:
            self._operands.append(name)
        return loops.REGISTERS + self._operands.index(name)

    def _target(self, step: s.Step) -> int:
        if step.name in self.stored and not isinstance(step, GridCodes):
            return self._operand(step.name)
        self._registers[step.name] = 0 if step.name == self.last else self._free()
        return self._registers[step.name]

    def _free(self) -> int:
        first = 0 if self.last is None else 1
        used = set(self._registers.values())
        for number in range(first, loops.REGISTERS):
            if number not in used:
                return number
        raise TooLargeError

    def _keep(self, numbers: Array) -> int:
        """Returns where in the parameters the numbers begin."""
        if not numbers.size:
            return 0
        start = sum(array.size for array in self._params)
        self._params.append(np.ravel(numbers).astype(np.float32))
        return start

    def _operations(self, step: s.Step) -> list[Operation]:
        match step:
            case s.Affine():
                return self._affine(step)
            case s.PReLU():
                return [(loops.PRELU, self._repeated(step.slope), 0)]
            case s.Clamp():
                return [(loops.CLAMP, np.array([step.low, step.high]), 0)]
            case s.Normalize():
                shift, divisor = self._repeated(-step.offset), self._repeated(step.divisor)
                return [(loops.SHIFT, shift, 0), (loops.DIVIDE, divisor, 0)]
            case s.UniformCodes():
                return [(loops.UNIFORM, np.array([step.step, step.offset, step.levels]), 0)]
            case GridCodes():
                return self._grid_codes(step)
            case s.Codes():
                return self._codes(step)
        return [
            (
                {s.Add: loops.ADD, IntAdd: loops.ADD, s.Mul: loops.MUL, s.SplitConv: loops.SPLIT}[type(step)],
                NOTHING,
                0,
            )
        ]

    def _affine(self, step: s.Affine) -> list[Operation]:
        if step.scale is not None and step.shift is not None:
            return [(loops.AFFINE, self._repeated(np.stack([step.scale, step.shift])), 0)]
        if step.scale is not None:
            return [(loops.SCALE, self._repeated(step.scale), 0)]
        if step.shift is not None:
            return [(loops.SHIFT, self._repeated(step.shift), 0)]
        return [(loops.COPY, NOTHING, 0)]

    def _grid_codes(self, step: GridCodes) -> list[Operation]:
        signs = [] if step.sign is None else [(loops.SCALE, self._repeated(step.sign), 0)]
        range_ = self.ranges.get(step.inputs[0])
        if range_ is not None and step.sign is not None:
            ends = np.stack(range_) * step.sign.astype(np.int64)
            range_ = ends.min(0), ends.max(0)
        return [*signs, grid_operation(step, self.channels, range_, self._period)]

    def _codes(self, step: s.Codes) -> list[Operation]:
        signs = [] if step.sign is None else [(loops.SCALE, self._repeated(step.sign), 0)]
        table = np.broadcast_to(step.thresholds.T.astype(np.float32), (step.levels, self.channels))
        counted = next((number for number in _COUNTED if number >= step.levels), None)
        number = 2 ** step.levels.bit_length() - 1 if counted is None else counted
        # Nothing exceeds infinity: thresholds that fill up are never passed.
        filled = np.full((number - step.levels, self.channels), np.float32(np.inf))
        table = np.concatenate([table, filled])
        if counted is None:
            return [*signs, (loops.SEARCH, table.T, number)]
        return [*signs, (loops.CODES, self._repeated(table), number)]

    def _repeated(self, array: Array) -> Array:
        """Returns `[k, period]` of `[C]` or `[k, C]`."""
        rows = np.atleast_2d(array).astype(np.float32)
        rows = np.broadcast_to(rows, (len(rows), self.channels))
        return np.tile(rows, (1, self._period // self.channels))
