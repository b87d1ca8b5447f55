"""What is known of one layer at one step: plain numbers, for loggers, files and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_SERIES = 16
"""Thresholds, and uses of levels, get a metric each up to this many."""


def entropy(counts: Sequence[float]) -> float:
    """Returns the entropy of counts in bits; 0 where there are none."""
    total = sum(counts)
    return -sum(c / total * math.log2(c / total) for c in counts if c > 0) if total else 0.0


def shares(counts: Sequence[float]) -> list[float]:
    """Returns counts over their sum; zeros where there are none."""
    total = sum(counts)
    return [c / total if total else 0.0 for c in counts]


@dataclass
class WeightRecord:
    """A layer's weights.

    Attributes:
        bits: The bit width.
        count: The number of weights.
        usage: The number of weights on each level.
        clipped: The share of weights at the ends of the range.
        changed: The share of weights that changed level since the last record; None at the first.
        scale: The mean scale `S`; None where the method has none.
    """

    bits: int
    count: int
    usage: list[float]
    clipped: float
    changed: float | None
    scale: float | None

    def metrics(self) -> dict[str, float]:
        """Returns scalars by name."""
        values = {
            "weight_entropy": entropy(self.usage),
            "weight_dead_levels": float(sum(c == 0 for c in self.usage)),
            "weight_clipped": self.clipped,
            **_series("weight_usage", shares(self.usage)),
        }
        optional = {"weight_changed": self.changed, "weight_scale": self.scale}
        return values | {name: value for name, value in optional.items() if value is not None}


@dataclass
class ActivationRecord:
    """A layer's input, sampled; the last fields but one are of learned thresholds only.

    Attributes:
        bits: The bit width.
        usage: The number of values on each level.
        clipped_low: The share of values at or below the lower end of the range.
        clipped_high: The share of values at or above the upper end of the range.
        low: The lower end of the axis of histogram and curve.
        high: The upper end of that axis.
        histogram: Counts over equal bins from `low` to `high`.
        start: The first knot.
        scale_in: The scale of the input.
        scale_out: The scale of the output.
        widths: The widths as learned, also those below the floor.
        thresholds: The thresholds in the scaled input.
        widths_at_floor: The number of widths at the floor, where no gradient moves them.
        curve: Other methods' values on an even grid from `low` to `high`.
    """

    bits: int
    usage: list[float]
    clipped_low: float
    clipped_high: float
    low: float
    high: float
    histogram: list[float]
    start: float = 0.0
    scale_in: float = 1.0
    scale_out: float = 1.0
    widths: list[float] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)
    widths_at_floor: int = 0
    curve: list[float] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Returns scalars by name."""
        values = {
            "activation_entropy": entropy(self.usage),
            "activation_dead_levels": float(sum(c == 0 for c in self.usage)),
            "activation_clipped_low": self.clipped_low,
            "activation_clipped_high": self.clipped_high,
            **_series("activation_usage", shares(self.usage)),
        }
        if self.thresholds:
            values |= {"scale_in": self.scale_in, "scale_out": self.scale_out}
            values |= {"widths_at_floor": float(self.widths_at_floor), "smallest_width": min(self.widths)}
            values |= _series("threshold", self.thresholds, first=1)
        return values


@dataclass
class LayerRecord:
    """One layer at one step; a part is None where it is not quantized (or did not run)."""

    name: str
    weight: WeightRecord | None
    activation: ActivationRecord | None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerRecord:
        """Returns the record of what `as_dict` or `dataclasses.asdict` returned."""
        weight, activation = values["weight"], values["activation"]
        return cls(
            values["name"],
            None if weight is None else WeightRecord(**weight),
            None if activation is None else ActivationRecord(**activation),
        )

    def scalars(self) -> dict[str, float]:
        """Returns scalars by name."""
        parts = [part.metrics() for part in (self.weight, self.activation) if part is not None]
        return {key: value for part in parts for key, value in part.items()}

    def metrics(self) -> dict[str, float]:
        """Returns scalars by full name, `quant/<layer>/<what>`."""
        return {f"quant/{self.name}/{key}": value for key, value in self.scalars().items()}

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values with four significant digits, for a file."""
        return {key: _rounded(value) for key, value in asdict(self).items()}


def mean_metrics(records: Sequence[LayerRecord]) -> dict[str, float]:
    """Returns means over layers of entropies and changed weights, and totals of dead levels and widths."""
    totals = ("weight_dead_levels", "activation_dead_levels", "widths_at_floor")
    means = ("weight_entropy", "activation_entropy", "weight_changed")
    metrics: dict[str, float] = {}
    each = [record.scalars() for record in records]
    for name in (*means, *totals):
        values = [values[name] for values in each if name in values]
        if values and name in means:
            metrics[f"quant/mean_{name}"] = sum(values) / len(values)
        elif values:
            metrics[f"quant/total_{name}"] = sum(values)
    return metrics


def _series(name: str, values: Sequence[float], first: int = 0) -> dict[str, float]:
    if len(values) > MAX_SERIES:
        return {}
    return {f"{name}_{first + i}": value for i, value in enumerate(values)}


def _rounded(value: Any) -> Any:  # noqa: ANN401 -- any plain value
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
