"""Quantizers and layers: codes by thresholds, integer sums, and full-precision layers as exact sums.

A quantizer folds the longest monotone end of the pending operations into its thresholds; everybody else has
them carried out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.description import FoldReport
from lightning_n2uq.export.ir.thresholds import Bool
from lightning_n2uq.export.lower.activations import IntervalRule, UniformRule, activation_rule
from lightning_n2uq.export.lower.builder import Builder, check_finite, to_float64
from lightning_n2uq.export.lower.deferred import Deferred, Float64, directions
from lightning_n2uq.export.lower.fixed_point import fixed_linear, split_conv
from lightning_n2uq.export.lower.fold import Conditions, above
from lightning_n2uq.export.lower.grids import fold_report, folded, grid_codes
from lightning_n2uq.export.lower.weights import IntegerWeight, integer_weight
from lightning_n2uq.layers import QuantConv2d, QuantLinear
from lightning_n2uq.quantizers import UniformGrid


class _Quantized(NamedTuple):
    """Codes: the step's name; their value is `step * code + offset`, the largest code `levels`."""

    name: str
    step: float
    levels: int
    offset: float


def quantized_layer(
    builder: Builder, value: Deferred, layer: QuantConv2d | QuantLinear, name: str, window: s.Window | None
) -> Deferred:
    """Adds a layer whose weights or activations are quantized; `window` is None for a linear layer."""
    weight, bias = layer.weight, layer.bias
    float_weight = getattr(layer.weight_quantizer, "name", "") == "float"
    if getattr(layer.activation_quantizer, "name", "") == "float":
        quantized = weight if float_weight else layer.weight_quantizer(weight)
        return float_layer(builder, value, quantized, bias, name, window)
    codes = _quantize(builder, value, layer.activation_quantizer, f"{name}.codes")
    if float_weight:
        bound = np.full(value.channels, codes.levels)
        real = Deferred(codes.name, value.channels, bound).affine(codes.step, codes.offset)
        return float_layer(builder, real, weight, bias, name, window)
    integers = integer_weight(layer.weight_quantizer, weight, name)
    sums = _integer_layer(builder, codes, integers, name, window)
    return sums if bias is None else sums.affine(shift=to_float64(bias))


def float_layer(
    builder: Builder, value: Deferred, weight: Tensor, bias: Tensor | None, name: str, window: s.Window | None
) -> Deferred:
    """Adds a full-precision convolution or linear layer, as exact sums over integers."""
    source, array = builder.value(value), weight.detach().cpu().double().numpy()
    check_finite(name, "weights", array)
    step, scale = _float_step(name, source, array, window)
    return builder.output(step).affine(scale, 0.0 if bias is None else to_float64(bias))


def _quantize(builder: Builder, value: Deferred, quantizer: nn.Module, name: str) -> _Quantized:
    if isinstance(quantizer, UniformGrid):
        return _Quantized(*grid_codes(builder, value, quantizer, name), quantizer.high, 0.0)
    rule = activation_rule(quantizer, name)
    if isinstance(rule, UniformRule) and builder.integer_maps:
        conditions = _uniform_conditions(rule)
        codes = _threshold_codes(builder, value, conditions, name)
    elif isinstance(rule, UniformRule):
        source = builder.value(value)
        codes = builder.place(s.UniformCodes(name, (source,), rule.step, rule.levels, rule.offset))
        builder.folds.append(
            FoldReport(codes, 0, len(value.pending), False, 0, "uniform steps take float values")
        )
    else:
        moved = value.affine(shift=-rule.offset) if rule.offset else value
        conditions = _interval_conditions(rule) if isinstance(rule, IntervalRule) else above(rule.thresholds)
        codes = _threshold_codes(builder, moved.affine(rule.scale_in), conditions, name)
    return _Quantized(codes, rule.step, rule.levels, rule.offset)


def _uniform_conditions(rule: UniformRule) -> Conditions:
    """Returns the quantizer's own arithmetic in float32, as conditions on a real number."""
    places, divisor, offset = np.arange(1, rule.levels + 1), np.float32(rule.step), np.float32(rule.offset)
    reached: Float64 = (places.astype(np.float64) - 0.5) * rule.step + rule.offset
    return Conditions(lambda y: np.rint((y.astype(np.float32) - offset) / divisor) >= places, reached)


def _interval_conditions(rule: IntervalRule) -> Conditions:
    """Returns EWGS's own arithmetic in float32, as conditions on a real number."""
    places, levels = np.arange(1, rule.levels + 1), np.float32(rule.levels)
    lower, width = np.float32(rule.lower), np.float32(rule.width)
    reached: Float64 = (places - 0.5) / rule.levels * rule.width + rule.lower

    def passes(y: Float64) -> Bool:
        share = np.clip((y.astype(np.float32) - lower) / width, np.float32(0), np.float32(1))
        reached_here: Bool = np.rint(share * levels) >= places
        return reached_here

    return Conditions(passes, reached)


def _threshold_codes(builder: Builder, value: Deferred, conditions: Conditions, name: str) -> str:
    value, explicit, reason = _monotone_end(builder, value)
    table, signs = folded(value, conditions)
    codes = builder.place(s.Codes(name, (value.base,), table, signs))
    builder.folds.append(fold_report(codes, value, signs, explicit, reason))
    return codes


def _monotone_end(builder: Builder, value: Deferred) -> tuple[Deferred, int, str]:
    """Carries out as many operations as needed for the rest to be monotone: the rest, how many, and why."""
    turning = [i for i, step in enumerate(value.pending, 1) if (step.directions() == 0).any()]
    if not turning:
        return value, 0, ""
    cut = turning[-1]
    bad = int((directions(value.pending[cut - 1 :], value.channels) == 0).sum())
    base = builder.value(replace(value, pending=value.pending[:cut]))
    rest = Deferred(base, value.channels, None, value.pending[cut:])
    return rest, cut, f"{bad} of {value.channels} channels not monotone"


def _integer_layer(
    builder: Builder, codes: _Quantized, weight: IntegerWeight, name: str, window: s.Window | None
) -> Deferred:
    numbers, scale = weight.integers, weight.scale
    kind = s.IntLinear if window is None else s.IntConv
    layer = kind(name, (codes.name,), numbers, weight.bits, weight.odd, codes.levels, window or s.Window())
    sums = builder.output(layer, layer.bound()).affine(scale * codes.step)
    if not codes.offset:
        return sums
    if window is None or not any(window.pads):
        total = numbers.reshape(len(numbers), -1).sum(1, dtype=np.float64)
        return sums.affine(shift=total * scale * codes.offset)
    inside = numbers.sum(1, dtype=np.float32)[:, None]
    _, height, width = builder.shapes[codes.name]
    border = s.BorderSums(f"{name}.border", (), inside, (height, width), replace(window, groups=1))
    return builder.add(sums, builder.output(border).affine(scale * codes.offset), f"{name}.add")


def _float_step(name: str, source: str, weight: Float64, window: s.Window | None) -> tuple[s.Step, Float64]:
    if window is None or (weight.shape[2:] == (1, 1) and window.groups == 1 and not any(window.pads)):
        integers, bits, scale = fixed_linear(weight.reshape(len(weight), -1))
        return s.FixedLinear(name, (source,), integers, bits, window.stride if window else (1, 1)), scale
    high, low, high_bits, low_bits, scale = split_conv(weight)
    return s.SplitConv(name, (source,), high, low, high_bits, low_bits, window), scale
