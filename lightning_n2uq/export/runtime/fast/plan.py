"""From a description's steps to the operations of the fast engine: which run together, and in what order.

Layers run on their own. The elementwise steps between them run as groups, each a pass over its maps: a group
begins where a layer (or a quantizer's codes) needs a value, takes in all elementwise steps that lead up to
it, and every other quantizer that reads the same maps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.integer_steps import GridCodes, IntAdd, IntMaxPool, SumPool
from lightning_n2uq.export.ir.shapes import infer_shapes
from lightning_n2uq.export.runtime.fast import loops
from lightning_n2uq.export.runtime.fast.byte_conv import ByteConvolution
from lightning_n2uq.export.runtime.fast.groups import Group, Stem, Values
from lightning_n2uq.export.runtime.fast.integer_maps import BytePool, sum_pool
from lightning_n2uq.export.runtime.fast.layers import FixedSums, IntegerSums, SplitMap, SplitSums, TorchStep
from lightning_n2uq.export.runtime.fast.program import ProgramBuilder, TooLargeError
from lightning_n2uq.export.runtime.fast.ranges import infer_ranges
from lightning_n2uq.export.runtime.fast.split_conv import SplitConvolution
from lightning_n2uq.export.runtime.fast.word_conv import WordConvolution

_MAPS = (s.Affine, s.PReLU, s.Clamp, s.Add, s.Mul, s.Normalize, s.SplitConv, IntAdd)
_QUANTIZERS = (s.Codes, s.UniformCodes, GridCodes)
_CODES = (s.Codes, s.UniformCodes)
"""Quantizers whose codes a group only writes."""
_MOVES = (s.MaxPool, IntMaxPool, s.Concat, s.Flatten)
_LAYERS = (s.IntConv, s.IntLinear)
_FLOATS = (s.FixedLinear, s.MeanPool, s.BorderSums)
FLOATS, BYTES, SIGNED, SUMS, OTHER = "floats", "bytes", "signed", "sums", "other"
"""What a value is: float32, uint8, int8, integers as float32, anything else (int32 of large sums)."""
_LOADS = {BYTES: loops.LOAD, SIGNED: loops.LOAD_SIGNED}
_DTYPES = {BYTES: torch.uint8, SIGNED: torch.int8}


@dataclass
class Operation:
    """One operation of a plan.

    Attributes:
        run: Adds its results to the values.
        kind: What it is, for profiles.
        frees: Names of the values that nobody reads after it.
    """

    run: Callable[[Values], None]
    kind: str
    frees: list[str] = field(default_factory=list)


class Plan:
    """The operations of a description, in order.

    Attributes:
        operations: What to run.
        constants: Values that no input changes.
        kinds: What the value of each step is, by name.
        alone: Names of steps that run as the plain engine runs them.
    """

    def __init__(self, description: Description) -> None:
        self.operations: list[Operation] = []
        self.constants: Values = {}
        self.kinds: dict[str, str] = {}
        self.alone: list[str] = []
        self._description = description
        self._steps = {step.name: step for step in description.steps}
        self._shapes = infer_shapes(description.steps)
        self._ranges = infer_ranges(description.steps, self._shapes)
        self._readers: dict[str, list[s.Step]] = {name: [] for name in self._steps}
        for step in description.steps:
            for name in step.inputs:
                self._readers[name].append(step)
        pixels = {"float32": FLOATS, "uint8": BYTES}
        self.kinds[description.input.name] = pixels.get(description.input.dtype, SUMS)
        self._find_constants()
        self._done = {description.input.name, *self.constants}
        self._reads: list[set[str]] = []
        self._writes: list[set[str]] = []
        for step in description.steps[1:]:
            self._classify(step)
        for step in description.steps[1:]:
            # Sums on grids bring their summands with them.
            waits = isinstance(step, (*_MAPS, GridCodes))
            if not waits or step.name == description.output:
                self._demand(step.name)
        for step in description.quantizers():
            self._demand(step.name)
        self._find_frees()

    def _find_constants(self) -> None:
        for step in self._description.steps[1:]:
            if all(name in self.constants for name in step.inputs):
                values = [self.constants[name] for name in step.inputs]
                self.constants[step.name] = TorchStep(step, (False,) * len(values))(*values)
                self.kinds[step.name] = FLOATS

    def _classify(self, step: s.Step) -> None:
        if step.name in self.constants:
            return
        inputs = {self.kinds[name] for name in step.inputs}
        if type(step) in _QUANTIZERS:
            kind = SIGNED if isinstance(step, GridCodes) and step.low < 0 else BYTES
        elif type(step) in (*_LAYERS, IntAdd, SumPool):
            ends = self._ranges.get(step.name, (s.EXACT_FLOAT32, s.EXACT_FLOAT32))
            fits = inputs <= {BYTES, SIGNED} and max(np.abs(end).max() for end in ends) < s.EXACT_FLOAT32
            kind = SUMS if fits else OTHER
        elif type(step) in _MOVES:
            kind = inputs.pop() if len(inputs) == 1 else OTHER
        elif type(step) in (s.Affine, *_FLOATS) or (type(step) in _MAPS and OTHER not in inputs):
            kind = FLOATS
        else:
            kind = OTHER
        self.kinds[step.name] = kind

    def _elementwise(self, step: s.Step) -> bool:
        """Returns whether a step can be part of a group."""
        if type(step) not in (*_MAPS, *_QUANTIZERS) or step.name in self.constants:
            return False
        kinds = [self.kinds[name] for name in step.inputs]
        if OTHER in kinds:
            return False
        if isinstance(step, IntAdd):
            return self.kinds[step.name] == SUMS
        if BYTES in kinds or SIGNED in kinds:
            return type(step) in (s.Affine, s.Normalize, s.Codes, GridCodes)
        if isinstance(step, s.Add | s.Mul):
            return all(self._shapes[name] == self._shapes[step.name] for name in step.inputs)
        return True

    def _demand(self, name: str) -> None:
        """Places what computes a value, unless it has been."""
        if name in self._done:
            return
        step = self._steps[name]
        if self._elementwise(step):
            self._place_group(step)
        elif not (type(step) is s.MaxPool and self._place_pool(step)):
            for source in step.inputs:
                self._demand(source)
            self._place_layer(step)

    def _place_layer(self, step: s.Step) -> None:
        run = self._layer(step)

        def operate(values: Values) -> None:
            values[step.name] = run(*(values[name] for name in step.inputs))

        self._append(operate, step.op, set(step.inputs), [step.name])

    def _layer(self, step: s.Step) -> Callable[..., Tensor]:
        """Returns what computes a step from its inputs."""
        if type(step) in _LAYERS and self.kinds[step.name] == SUMS:
            assert isinstance(step, s.IntConv)
            return self._sums(step)
        if type(step) is IntMaxPool and self.kinds[step.name] == BYTES:
            return BytePool(step)
        if type(step) is SumPool and self.kinds[step.name] == SUMS:
            return sum_pool
        if type(step) is s.FixedLinear and len(self._shapes[step.name]) == 3:
            return FixedSums(step)
        if type(step) is s.SplitConv and SplitMap.takes(step) and self.kinds[step.inputs[0]] == FLOATS:
            return SplitMap(step)
        self.alone.append(step.name)
        moves = type(step) in _MOVES  # whatever the values are
        return TorchStep(step, tuple(self.kinds[name] == SUMS and not moves for name in step.inputs))

    def _sums(self, step: s.IntConv) -> Callable[..., Tensor]:
        signed = self.kinds[step.inputs[0]] == SIGNED
        if not signed and ByteConvolution.takes(step):
            return ByteConvolution(step)
        if signed and WordConvolution.takes(step):
            return WordConvolution(step)
        return IntegerSums(step, signed)

    def _append(self, run: Callable[[Values], None], kind: str, reads: set[str], writes: list[str]) -> None:
        self.operations.append(Operation(run, kind))
        self._reads.append(reads)
        self._writes.append(set(writes))
        self._done.update(writes)

    def _ancestors(self, step: s.Step) -> list[s.Step]:
        """Returns the elementwise steps of one shape that lead up to a step, itself included, in order.

        What else they read is placed first.
        """
        while True:
            inside, outside = self._around(step)
            if not outside:
                return [other for other in self._description.steps if other.name in inside]
            for name in sorted(outside):
                self._demand(name)

    def _around(self, step: s.Step) -> tuple[set[str], set[str]]:
        """Returns the names of what runs together with a step, and of what is missing in front of it."""
        inside, outside, waiting = {step.name}, set[str](), [step]
        while waiting:
            reader = waiting.pop()
            for name in set(reader.inputs) - self._done - inside:
                source = self._steps[name]
                joins = self._elementwise(source) and self._shapes[name] == self._shapes[step.name]
                if joins and type(source) not in _CODES and not isinstance(reader, s.SplitConv):
                    inside.add(name)
                    waiting.append(source)
                else:
                    outside.add(name)
        return inside, outside

    def _place_group(self, step: s.Step) -> None:
        members = self._ancestors(step)
        if step.name in self._done:  # placed with what it reads
            return
        stems = [member for member in members if isinstance(member, s.SplitConv)]
        if len(stems) > 1:
            for stem in stems:
                self._place_members([stem])
            self._place_group(step)
            return
        self._place_members(self._joined(members))

    def _joined(self, members: list[s.Step]) -> list[s.Step]:
        """Adds the quantizers that read the same maps and nothing that is not there yet."""
        inside = {member.name for member in members}
        near = inside | {name for member in members for name in member.inputs}
        shape = self._shapes[members[0].name]
        more = [
            other
            for other in self._description.steps
            if isinstance(other, _QUANTIZERS)
            and other.name not in inside | self._done
            and self._elementwise(other)
            and self._shapes[other.name] == shape
            and set(other.inputs) <= near & (inside | self._done)
        ]
        return [*members, *more]

    def _place_members(self, members: list[s.Step], pool: s.MaxPool | None = None) -> None:
        inside = {member.name for member in members}
        stem = self._stem(members, pool)
        own = None if stem is None else stem.own_value
        if own is not None and len(members) == 1:
            self._place_layer(own)
            return
        stored = (
            [] if pool is not None else [member.name for member in members if self._leaves(member, inside)]
        )
        reads = {name for member in members for name in member.inputs} - inside
        shape = self._shapes[members[0].name]
        builder = ProgramBuilder(
            shape[0],
            set(stored),
            {name: _LOADS[self.kinds[name]] for name in reads if self.kinds[name] in _LOADS},
            None if pool is None else pool.inputs[0],
            self._ranges,
        )
        try:
            program = builder.build([member for member in members if member is not own])
        except TooLargeError:
            for member in members:
                self._place_layer(member)
            return
        dtypes = {name: _DTYPES.get(self.kinds[name], torch.float32) for name in stored}
        shared = {name for name in reads if name in self.constants}
        group = Group(program, dtypes, shape, shared, stem, pool)
        kind = "pass" if group.stem is None else "stem"
        self._append(group.run, kind, reads, group.outputs if pool is not None else stored)

    def _stem(self, members: list[s.Step], pool: s.MaxPool | None) -> Stem | None:
        stem = next((member for member in members if isinstance(member, s.SplitConv)), None)
        if stem is None:
            return None
        steps = [*members, pool] if pool is not None else members
        plain = [(step, TorchStep(step, (False,) * len(step.inputs))) for step in steps]
        sums = SplitConvolution(stem) if SplitConvolution.takes(stem) else SplitSums(stem)
        return Stem(stem, sums, plain)

    def _leaves(self, step: s.Step, inside: set[str]) -> bool:
        """Returns whether a step's value is needed outside a group; codes may always be asked for."""
        wanted = step.name == self._description.output or isinstance(step, _QUANTIZERS)
        return wanted or any(reader.name not in inside for reader in self._readers[step.name])

    def _place_pool(self, pool: s.MaxPool) -> bool:
        """Places a max pooling together with the steps in front of it, if nothing else reads those."""
        source = self._steps[pool.inputs[0]]
        if source.name in self._done or not self._elementwise(source) or isinstance(source, s.SplitConv):
            return False
        members = self._ancestors(source)
        inside = {member.name for member in members} | {pool.name}
        alone = not any(self._leaves(member, inside) for member in members)
        if source.name in self._done or not alone or sum(isinstance(m, s.SplitConv) for m in members) > 1:
            return False
        self._place_members(members, pool)
        return True

    def _find_frees(self) -> None:
        kept = {self._description.input.name, self._description.output, *self.constants}
        seen: set[str] = set()
        rows = zip(self.operations, self._reads, self._writes, strict=True)
        for operation, reads, writes in reversed(list(rows)):
            operation.frees = sorted((reads | writes) - seen - kept)
            seen |= reads
