"""Runs a program of elementwise steps over maps: all at once, behind a stem, or in front of a max pooling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.runtime.fast import loops, pool_loops
from lightning_n2uq.export.runtime.fast.layers import SplitSums, TorchStep
from lightning_n2uq.export.runtime.fast.program import Program, products
from lightning_n2uq.export.runtime.fast.split_conv import SplitConvolution
from lightning_n2uq.ops.backends.common.jit import Array, array, run_chunks

_LENGTH = 2048
"""Values of a block: a few of them fit the processor's first cache."""
_FEWEST_BLOCKS = 8
"""Fewer blocks than this are not worth another thread."""

_STEM_VALUES = 2**20
"""A stem runs on so many of its output values at a time: they then fit a processor's cache."""

Values = dict[str, Tensor]


@dataclass
class Stem:
    """The `SplitConv` that a group begins with, and what runs instead for infinities and NaN."""

    step: s.SplitConv
    sums: SplitSums | SplitConvolution
    plain: list[tuple[s.Step, TorchStep]]

    @property
    def own_value(self) -> s.SplitConv | None:
        """The step if its own value is an operand of the group's program; None if its three products are."""
        return self.step if isinstance(self.sums, SplitConvolution) else None

    def products(self, x: Tensor, scales: Tensor, kept: Tensor | None) -> Values:
        """Returns what the program reads of the step, by operands' names.

        Args:
            x: Dense images `[N, C, H, W]`.
            scales: `[N]`, finite.
            kept: Where the step's own value goes, if others read it too.
        """
        if isinstance(self.sums, SplitConvolution):
            return {self.step.name: self.sums(x, scales, kept)}
        return self.sums.products(x, scales)


class Group:
    """Elementwise steps of one shape.

    Args:
        program: What it runs.
        stored: Names of the maps that it writes, and their dtypes.
        shape: Of one sample's maps.
        shared: Names of inputs that all samples have in common.
        stem: The `SplitConv` that is one of its steps, if any.
        pool: The max pooling behind it, if any.

    Attributes:
        stem: As given.
        outputs: Names of the maps that it writes.
    """

    def __init__(
        self,
        program: Program,
        stored: Mapping[str, torch.dtype],
        shape: tuple[int, ...],
        shared: set[str],
        stem: Stem | None = None,
        pool: s.MaxPool | None = None,
    ) -> None:
        self._program, self._stored, self._shape = program, dict(stored), shape
        self._shared, self._pool = shared, pool
        self.stem = stem
        self._elements = int(np.prod(shape))
        self._length = max(1, _LENGTH // program.period) * program.period
        self.outputs = [pool.name] if pool is not None else list(stored)
        self._by_sample = bool(shared) or stem is not None or pool is not None

    def run(self, values: Values) -> None:
        """Adds the maps that the group writes to the values."""
        if self.stem is None:
            count = self._count(values)
            self._allocate(values, count)
            self._run(values, slice(0, count), {}, np.zeros(1, np.float32))
            return
        images = values[self.stem.step.inputs[0]]
        scales = self.stem.sums.scales(images)
        if not bool(torch.isfinite(scales).all()):
            self._run_plain(values)
            return
        self._allocate(values, len(images))
        if self._pool is not None and isinstance(self.stem.sums, SplitConvolution):
            self._run_rows(self.stem.sums, values, images, scales)
            return
        together = max(1, _STEM_VALUES // self._elements)
        for first in range(0, len(images), together):
            part = slice(first, min(first + together, len(images)))
            found = self.stem.products(images[part], scales[part], self._kept(values, part))
            self._run(values, part, found, array(scales[part]))

    def _kept(self, values: Values, part: slice) -> Tensor | None:
        own = None if self.stem is None else self.stem.own_value
        return values[own.name][part] if own is not None and own.name in self._stored else None

    def _run_plain(self, values: Values) -> None:
        assert self.stem is not None
        inside = dict(values)
        for step, run in self.stem.plain:
            inside[step.name] = run(*(inside[name] for name in step.inputs))
        values.update({name: inside[name] for name in self.outputs})

    def _count(self, values: Values) -> int:
        names = [name for name in self._program.operands if name in values and name not in self._shared]
        return len(values[names[0]])

    def _allocate(self, values: Values, count: int) -> None:
        if self._pool is not None:
            size = self._pool.window.output_size(self._shape[1:], self._pool.kernel)
            values[self._pool.name] = _empty((count, self._shape[0], *size), torch.float32)
            return
        for name, dtype in self._stored.items():
            values[name] = _empty((count, *self._shape), dtype)

    def _run_rows(
        self, convolution: SplitConvolution, values: Values, images: Tensor, scales: Tensor
    ) -> None:
        """Runs all of a stem row by row, from the images to the pooled map."""
        together = max(1, _STEM_VALUES // images[0].numel())
        for first in range(0, len(images), together):
            part = slice(first, min(first + together, len(images)))
            parts = convolution.parts(images[part], scales[part])
            name = convolution.step.name
            stem = loops.REGISTERS + self._program.operands.index(name)
            numbers = self._numbers(values, part, {name: images[:0]}, array(scales[part]))
            self._run_pool(values, part, numbers, stem, *parts[1:], *convolution.units)

    def _run(self, values: Values, part: slice, found: Values, scales: Array) -> None:
        """Runs the program on some samples, whose stem's products and scales these are."""
        numbers = self._numbers(values, part, found, scales)
        if self._pool is not None:
            nothing = np.zeros(0, np.int64)
            self._run_pool(values, part, numbers, -1, nothing, nothing, nothing, np.float32(0), np.float32(0))
            return
        elements, count = self._sizes(part)
        blocks = -(-elements // self._length) * count
        sizes = elements, self._length, self._program.channels, self._program.period
        run_chunks(loops.run_program, blocks, _FEWEST_BLOCKS, *numbers, *sizes)

    def _sizes(self, part: slice) -> tuple[int, int]:
        """Returns the values of a sample and the number of samples; all are one where they may be."""
        count = part.stop - part.start
        return (self._elements, count) if self._by_sample else (self._elements * count, 1)

    def _numbers(self, values: Values, part: slice, found: Values, scales: Array) -> tuple[Array, ...]:
        """Returns the first arguments of `loops`: the program, and where its maps are."""
        held = [self._operand(name, values, part, found) for name in self._program.operands]
        addresses = np.array([0] * loops.REGISTERS + [x.data_ptr() for x in held], np.int64)
        spans = self._spans(self._sizes(part)[0])
        return self._program.code, self._program.params, addresses, spans, scales

    def _operand(self, name: str, values: Values, part: slice, found: Values) -> Tensor:
        if name in found:
            return found[name]
        return values[name] if name in self._shared else values[name][part]

    def _spans(self, elements: int) -> Array:
        """Returns by operand how many values a sample has."""
        high = "" if self.stem is None else products(self.stem.step.name)[0]
        factors = [0 if name in self._shared else 1 + (name == high) for name in self._program.operands]
        return np.array([0] * loops.REGISTERS + [factor * elements for factor in factors], np.int64)

    def _run_pool(
        self,
        values: Values,
        part: slice,
        numbers: tuple[Array, ...],
        *stem: Any,  # noqa: ANN401 -- as `run_pool` takes them
    ) -> None:
        assert self._pool is not None
        y = array(values[self._pool.name][part].permute(0, 2, 3, 1))
        window, (_, height, width) = self._pool.window, self._shape
        sizes = (self._pool.kernel, window.stride, window.pads[:2], window.dilation)
        places = [np.array(size, np.int64) for size in sizes]
        channels = self._program.channels, self._program.period
        rows = y.shape[0] * y.shape[1]
        run_chunks(pool_loops.run_pool, rows, 4, *numbers, y, height, width, *places, *channels, *stem)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if len(shape) != 4:
        return torch.empty(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
