"""Turns layers, one after the other, into steps.

Values are `Lazy`: per-channel operations wait until somebody needs the number. A quantizer folds the longest
monotone end of the waiting operations into its thresholds; everybody else has them carried out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.description import FoldReport
from lightning_n2uq.export.ir.shapes import output_shape
from lightning_n2uq.export.lower.activations import ThresholdRule, UniformRule, activation_rule
from lightning_n2uq.export.lower.deferred import Bend, Float64, Lazy, Limit, Linear, Stage, directions
from lightning_n2uq.export.lower.fixed_point import fixed_linear, split_conv
from lightning_n2uq.export.lower.fold import fold_float, fold_integer
from lightning_n2uq.export.lower.weights import IntegerWeight, integer_weight
from lightning_n2uq.layers import QuantConv2d, QuantLinear


def to_float64(tensor: Tensor) -> Float64:
    """A tensor's values, flattened."""
    values: Float64 = tensor.detach().cpu().double().reshape(-1).numpy()
    return values


class Quantized(NamedTuple):
    """Codes: the step's name; their value is `step * code + offset`, the largest code `levels`."""

    name: str
    step: float
    levels: int
    offset: float


class Builder:
    """Collects steps and fold reports.

    Attributes:
        steps: so far, in order.
        shapes: of their outputs, without the batch.
        folds: one report per quantizer.
    """

    def __init__(self) -> None:
        self.steps: list[s.Step] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.folds: list[FoldReport] = []
        self._names: set[str] = set()
        self._done: dict[tuple[object, ...], str] = {}
        self._stages: list[Stage] = []  # keeps stages alive: _done goes by their identity

    def emit(self, step: s.Step) -> str:
        """Appends a step; its name gets a number if it is taken."""
        name, count = step.name, 1
        while name in self._names:
            count += 1
            name = f"{step.name}_{count}"
        self._names.add(name)
        shape = output_shape(step, [self.shapes[source] for source in step.inputs])
        self.shapes[name] = shape
        self.steps.append(replace(step, name=name))
        return name

    def lazy(self, step: s.Step, bound: NDArray[np.int64] | None = None) -> Lazy:
        """`emit`, and its output as a value; `bound` as in `Lazy`."""
        name = self.emit(step)
        return Lazy(name, self.shapes[name][0], bound)

    def input(self, shape: tuple[int, ...]) -> Lazy:
        """The float32 images `[N, *shape]`."""
        return self.lazy(s.Input("images", (), shape))

    def value(self, lazy: Lazy) -> str:
        """Name of a step with the float32 value: carries waiting operations out, once."""
        name = lazy.base
        stages = lazy.stages
        if lazy.bound is not None and not (stages and isinstance(stages[0], Linear)):
            name = self._once((name,), s.Affine(f"{name}.real", (name,)))
        for count, stage in enumerate(stages, 1):
            integer = lazy.bound is not None and count == 1
            step = _carry_out(name, stage, integer)
            if step is not None:
                self._stages.append(stage)
                name = self._once((lazy.base, *map(id, stages[:count])), step)
        return name

    def _once(self, key: tuple[object, ...], step: s.Step) -> str:
        if key not in self._done:
            self._done[key] = self.emit(step)
        return self._done[key]

    def quantize(self, lazy: Lazy, quantizer: nn.Module, name: str) -> Quantized:
        """Codes of a value."""
        rule = activation_rule(quantizer, name)
        if isinstance(rule, UniformRule):
            source = self.value(lazy)
            codes = self.emit(s.UniformCodes(name, (source,), rule.step, rule.levels, rule.offset))
            report = FoldReport(codes, 0, len(lazy.stages), False, 0, "uniform steps take float values")
            self.folds.append(report)
        else:
            moved = lazy.linear(shift=-rule.offset) if rule.offset else lazy
            codes = self._threshold_codes(moved.linear(rule.scale_in), rule, name)
        return Quantized(codes, rule.step, rule.levels, rule.offset)

    def _threshold_codes(self, lazy: Lazy, rule: ThresholdRule, name: str) -> str:
        cut = self._first_monotone(lazy)
        reason = ""
        if cut:
            bad = int((directions(lazy.stages[cut - 1 :], lazy.channels) == 0).sum())
            reason = f"{bad} of {lazy.channels} channels not monotone"
            base = self.value(replace(lazy, stages=lazy.stages[:cut]))
            lazy, explicit = Lazy(base, lazy.channels, None, lazy.stages[cut:]), cut
        else:
            explicit = 0
        integer = lazy.bound is not None
        table: NDArray[np.int32] | NDArray[np.float32]
        if lazy.bound is not None:
            table, sign = fold_integer(lazy.stages, rule.thresholds, lazy.bound)
        else:
            table, sign = fold_float(lazy.stages, rule.thresholds, lazy.channels)
        if not integer and (table == table[:1]).all() and (sign == 1).all():
            table = table[:1]
        signs = None if (sign == 1).all() else sign.astype(table.dtype)
        codes = self.emit(s.Codes(name, (lazy.base,), table, signs))
        reversed_channels = int((sign < 0).sum())
        self.folds.append(FoldReport(codes, len(lazy.stages), explicit, integer, reversed_channels, reason))
        return codes

    @staticmethod
    def _first_monotone(lazy: Lazy) -> int:
        """Number of leading stages that have to be carried out so that the rest is monotone."""
        cut = 0
        for position, stage in enumerate(lazy.stages, 1):
            if (stage.directions() == 0).any():
                cut = position
        return cut

    def quantized_layer(
        self, lazy: Lazy, layer: QuantConv2d | QuantLinear, name: str, window: s.Window | None
    ) -> Lazy:
        """A layer whose weights or activations are quantized; `window` is None for a linear layer."""
        weight, bias = layer.weight, layer.bias
        float_weight = getattr(layer.weight_quantizer, "name", "") == "float"
        float_input = getattr(layer.activation_quantizer, "name", "") == "float"
        if float_input:
            quantized = weight if float_weight else layer.weight_quantizer(weight)
            return self.float_layer(lazy, quantized, bias, name, window)
        codes = self.quantize(lazy, layer.activation_quantizer, f"{name}.codes")
        if float_weight:
            value = Lazy(codes.name, lazy.channels, np.full(lazy.channels, codes.levels))
            return self.float_layer(value.linear(codes.step, codes.offset), weight, bias, name, window)
        integers = integer_weight(layer.weight_quantizer, weight, name)
        out = self._integer_layer(codes, integers, name, window)
        return out if bias is None else out.linear(shift=to_float64(bias))

    def _integer_layer(
        self, codes: Quantized, weight: IntegerWeight, name: str, window: s.Window | None
    ) -> Lazy:
        kind = s.IntLinear if window is None else s.IntConv
        numbers = weight.integers
        layer = kind(
            name, (codes.name,), numbers, weight.bits, weight.odd, codes.levels, window or s.Window()
        )
        sums = self.lazy(layer, layer.bound()).linear(weight.scale * codes.step)
        if not codes.offset:
            return sums
        if window is None or not any(window.pads):
            total = numbers.reshape(len(numbers), -1).sum(1, dtype=np.float64)
            return sums.linear(shift=total * weight.scale * codes.offset)
        inside = numbers.sum(1, dtype=np.float32)[:, None]
        size = self.shapes[codes.name][1:]
        border = s.BorderSums(f"{name}.border", (), inside, (size[0], size[1]), replace(window, groups=1))
        return self.add(sums, self.lazy(border).linear(weight.scale * codes.offset), f"{name}.add")

    def float_layer(
        self, lazy: Lazy, weight: Tensor, bias: Tensor | None, name: str, window: s.Window | None
    ) -> Lazy:
        """A full-precision convolution or linear layer, as exact sums over integers."""
        source, array = self.value(lazy), weight.detach().cpu().double().numpy()
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: weights are not finite; nothing can be exported from this network")
        step, scale = _float_step(name, source, array, window)
        out = self.lazy(step)
        return out.linear(scale, 0.0 if bias is None else to_float64(bias))

    def add(self, left: Lazy, right: Lazy, name: str) -> Lazy:
        """Sum of two values; their shifts wait until after the sum."""
        left, shift_left = left.without_shift()
        right, shift_right = right.without_shift()
        total = shift_left + shift_right
        # One addition for both where a product is carried out anyway.
        if left.stages and isinstance(left.stages[-1], Linear):
            left, total = left.linear(shift=total), np.zeros_like(total)
        elif right.stages and isinstance(right.stages[-1], Linear):
            right, total = right.linear(shift=total), np.zeros_like(total)
        added = self.lazy(s.Add(name, (self.value(left), self.value(right))))
        return added.linear(shift=total) if total.any() else added

    def multiply(self, left: Lazy, right: Lazy, name: str) -> Lazy:
        """Product of two values; one may be a gate per channel."""
        return self.lazy(s.Mul(name, (self.value(left), self.value(right))))

    def flatten(self, lazy: Lazy, name: str) -> Lazy:
        """All but the batch in one axis."""
        return self.lazy(s.Flatten(name, (self.value(lazy),)))


def _carry_out(name: str, stage: Stage, integer: bool) -> s.Step | None:
    """The step of one stage; None where it changes nothing."""
    if isinstance(stage, Bend):
        return s.PReLU(f"{name}.prelu", (name,), stage.slope.astype(np.float32))
    if isinstance(stage, Limit):
        return s.Clamp(f"{name}.clamp", (name,), stage.low, stage.high)
    scale = None if (stage.scale == 1).all() else stage.scale.astype(np.float32)
    shift = None if (stage.shift == 0).all() else stage.shift.astype(np.float32)
    if scale is None and shift is None and not integer:
        return None
    return s.Affine(f"{name}.affine", (name,), scale, shift)


def _float_step(
    name: str, source: str, weight: Float64, window: s.Window | None
) -> tuple[s.Step, NDArray[np.float64]]:
    pointwise = window is None or (weight.shape[2:] == (1, 1) and window.groups == 1 and not any(window.pads))
    if pointwise:
        integers, bits, scale = fixed_linear(weight.reshape(len(weight), -1))
        return s.FixedLinear(name, (source,), integers, bits, window.stride if window else (1, 1)), scale
    high, low, high_bits, low_bits, scale = split_conv(weight)
    return s.SplitConv(name, (source,), high, low, high_bits, low_bits, window or s.Window()), scale
