"""Trained activation quantizers as thresholds, or as a uniform step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from torch import nn

from lightning_n2uq.convert.calibrated import CalibratedInput
from lightning_n2uq.export.lower.deferred import Float64
from lightning_n2uq.ops.tables import floored_widths, output_step
from lightning_n2uq.quantizers import EWGS, LSQ, PACT, DoReFa, LearnableThresholdQuantizer, LSQPlus
from lightning_n2uq.quantizers.base import STEP_FLOOR


@dataclass(frozen=True)
class ThresholdRule:
    """`value = step * #{k : scale_in * (x - offset) > thresholds_k} + offset`, all float64."""

    thresholds: Float64
    scale_in: float
    step: float
    offset: float = 0.0

    @property
    def levels(self) -> int:
        """Largest code."""
        return self.thresholds.size


@dataclass(frozen=True)
class UniformRule:
    """`value = step * clip(round((x - offset) / step), 0, levels) + offset`; float32 numbers."""

    step: float
    levels: int
    offset: float = 0.0


@dataclass(frozen=True)
class IntervalRule:
    """`value = step * round(levels * v) + offset`, `v = clip((z - lower) / width, 0, 1)`.

    `z = scale_in * (x - offset)`; `v` and its rounding are computed in float32.
    """

    lower: float
    width: float
    levels: int
    step: float
    scale_in: float = 1.0
    offset: float = 0.0


Rule: TypeAlias = ThresholdRule | UniformRule | IntervalRule


def activation_rule(quantizer: nn.Module, name: str) -> Rule:
    """Returns what an activation quantizer computes.

    Raises:
        ValueError: It has no integer form, was never given data, or holds numbers that are not finite.
    """
    if isinstance(quantizer, CalibratedInput):
        return _calibrated_rule(quantizer, name)
    if isinstance(quantizer, LearnableThresholdQuantizer):
        return _threshold_rule(quantizer, name)
    if isinstance(quantizer, EWGS):
        return _interval_rule(quantizer, name)
    offset = 0.0
    levels = getattr(quantizer, "num_levels", 1) - 1
    if isinstance(quantizer, LSQ) and not quantizer.signed:
        if not bool(quantizer.initialized):
            raise ValueError(f"{name}: its LSQ step was never initialised; train the network first")
        step = float(quantizer.bounded("step").detach())
        if isinstance(quantizer, LSQPlus) and quantizer.offset is not None:
            offset = float(quantizer.offset.detach())
    elif isinstance(quantizer, PACT):
        step = float(quantizer.bounded("clip").detach() / levels)
    elif isinstance(quantizer, DoReFa):
        step = float(np.float32(1.0 / levels))
    else:
        raise ValueError(
            f"{name}: activation quantizer {getattr(quantizer, 'name', type(quantizer).__name__)!r} has no "
            "evenly spaced levels; exportable are n2uq, n2uq_fixed, lsq, lsq_plus, pact, dorefa, ewgs "
            "and float"
        )
    if not (np.isfinite(step) and step > 0 and np.isfinite(offset)):
        raise ValueError(f"{name}: step {step}, offset {offset}; allowed is a positive step, both finite")
    return UniformRule(step, levels, offset)


def _calibrated_rule(quantizer: CalibratedInput, name: str) -> Rule:
    """Returns the rule of the inner quantizer, which sees `(x - offset) / scale`."""
    if not bool(quantizer.initialized):
        raise ValueError(f"{name}: its range was never fitted; calibrate or train the network first")
    rule = activation_rule(quantizer.inner, name)
    if quantizer.offset is None:
        return rule
    offset, scale = float(quantizer.offset.detach()), float(quantizer.scale)
    if not isinstance(rule, UniformRule):
        return replace(rule, scale_in=rule.scale_in / scale, step=rule.step * scale, offset=offset)
    return replace(rule, step=float(np.float32(rule.step * scale)), offset=offset)


def _interval_rule(quantizer: EWGS, name: str) -> IntervalRule:
    if not bool(quantizer.initialized):
        raise ValueError(f"{name}: its interval was never initialised; train the network first")
    lower, upper = (end.detach().float().reshape(()).cpu() for end in (quantizer.lower, quantizer.upper))
    width = float((upper - lower).clamp_min(STEP_FLOOR))
    levels = quantizer.num_levels - 1
    if not np.isfinite([float(lower), width]).all():
        raise ValueError(f"{name}: interval {float(lower)} to {float(upper)}; allowed are finite numbers")
    return IntervalRule(float(lower), width, levels, float(np.float32(1.0 / levels)))


def _threshold_rule(quantizer: LearnableThresholdQuantizer, name: str) -> ThresholdRule:
    start = quantizer.start.detach().double().reshape(()).cpu()
    widths = floored_widths(quantizer.widths.detach().double()).cpu()
    # As in ops/tables.py, without the rounding to the compute dtype at the end.
    right = start + widths.cumsum(0)
    thresholds = (right - widths / 2).numpy()
    if quantizer.comparison == ">=":  # an input at a threshold passes
        thresholds = np.nextafter(thresholds, -np.inf)
    scale_in = float(quantizer.scale_in.detach().double())
    step = float(quantizer.scale_out.detach().double()) * output_step(thresholds.size)
    if not (np.isfinite(thresholds).all() and np.isfinite([scale_in, step]).all()):
        raise ValueError(f"{name}: thresholds or scales are not finite; nothing can be exported")
    return ThresholdRule(thresholds, scale_in, step)
