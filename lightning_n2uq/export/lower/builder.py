"""Places steps one after the other, while per-channel operations wait until somebody needs the number."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.description import FoldReport
from lightning_n2uq.export.ir.shapes import Shape, output_shape
from lightning_n2uq.export.lower.deferred import Deferred, Float64, scale_and_shift


def to_float64(tensor: Tensor) -> Float64:
    """Returns a tensor's values, flattened."""
    values: Float64 = tensor.detach().cpu().double().reshape(-1).numpy()
    return values


def check_finite(name: str, what: str, *arrays: NDArray[np.floating]) -> None:
    """Raises a one-line `ValueError` unless `what` the layer `name` holds are finite numbers."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(f"{name}: {what} are not finite; nothing can be exported from this network")


class Builder:
    """Collects steps and fold reports.

    Attributes:
        steps: Steps so far, in order.
        shapes: Shapes of their outputs, without the batch.
        folds: One report per quantizer.
        integer_maps: Whether the maps between layers are integers times a step, so that every quantizer is
            thresholds of integers.
    """

    def __init__(self) -> None:
        self.steps: list[s.Step] = []
        self.shapes: dict[str, Shape] = {}
        self.folds: list[FoldReport] = []
        self.integer_maps = False
        self._carried_out: dict[tuple[object, ...], str] = {}
        self._kept: list[s.Step] = []  # keeps pending steps alive: _carried_out goes by their identity

    def place(self, step: s.Step) -> str:
        """Appends a step and returns its name, which gets a number if it is taken."""
        name, count = step.name, 1
        while name in self.shapes:
            count += 1
            name = f"{step.name}_{count}"
        self.shapes[name] = output_shape(step, *(self.shapes[source] for source in step.inputs))
        self.steps.append(replace(step, name=name))
        return name

    def output(self, step: s.Step, bound: NDArray[np.int64] | None = None) -> Deferred:
        """Appends a step and returns its output; `bound` as in `Deferred`."""
        name = self.place(step)
        return Deferred(name, self.shapes[name][0], bound)

    def value(self, value: Deferred) -> str:
        """Carries pending operations out, once, and returns the name of the step with the float32 value."""
        name, pending = value.base, value.pending
        self._kept.extend(pending)
        integer = value.bound is not None
        if integer and not (pending and isinstance(pending[0], s.Affine)):
            name = self._once((name,), s.Affine(f"{name}.real", (name,)))
        for count, step in enumerate(pending, 1):
            placed = _carried_out(step, name)
            unchanged = isinstance(placed, s.Affine) and placed.scale is placed.shift is None
            if not unchanged or (integer and count == 1):
                name = self._once((value.base, *map(id, pending[:count])), placed)
        return name

    def _once(self, key: tuple[object, ...], step: s.Step) -> str:
        if key not in self._carried_out:
            self._carried_out[key] = self.place(step)
        return self._carried_out[key]

    def add(self, left: Deferred, right: Deferred, name: str) -> Deferred:
        """Adds two values; their shifts wait until after the sum."""
        left, shift_left = left.without_shift()
        right, shift_right = right.without_shift()
        total = shift_left + shift_right
        # One addition for both where a product is carried out anyway.
        if left.ends_affine():
            left, total = left.affine(shift=total), np.zeros_like(total)
        elif right.ends_affine():
            right, total = right.affine(shift=total), np.zeros_like(total)
        added = self.output(s.Add(name, (self.value(left), self.value(right))))
        return added.affine(shift=total) if total.any() else added

    def multiply(self, left: Deferred, right: Deferred, name: str) -> Deferred:
        """Multiplies two values; one may be a gate per channel."""
        return self.output(s.Mul(name, (self.value(left), self.value(right))))

    def flatten(self, value: Deferred, name: str) -> Deferred:
        """Puts all but the batch into one axis; of single numbers, integers stay what they are."""
        if value.bound is not None and self.shapes[value.base][1:] == (1, 1):
            return replace(value, base=self.place(s.Flatten(name, (value.base,))))
        return self.output(s.Flatten(name, (self.value(value),)))


def _carried_out(step: s.ChannelStep, source: str) -> s.Step:
    """A pending operation as a float32 step on `source`; what an affine map leaves as it is becomes None."""
    name = f"{source}.{step.op}"
    if isinstance(step, s.Affine):
        scale, shift = scale_and_shift(step)
        return s.Affine(
            name,
            (source,),
            None if (scale == 1).all() else scale.astype(np.float32),
            None if (shift == 0).all() else shift.astype(np.float32),
        )
    floats = {key: array.astype(np.float32) for key, array in step.arrays().items()}
    return replace(step, name=name, inputs=(source,), **floats)
