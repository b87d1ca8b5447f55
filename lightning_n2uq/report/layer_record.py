"""What is known of one layer at one step: plain numbers, for loggers, files and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_SERIES = 16
"""Thresholds, and uses of levels, get a metric each up to this many."""


def entropy(counts: Sequence[float]) -> float:
    """Entropy in bits of counts; 0 where there are none."""
    total = sum(counts)
    return -sum(c / total * math.log2(c / total) for c in counts if c > 0) if total else 0.0


def shares(counts: Sequence[float]) -> list[float]:
    """Counts over their sum; zeros where there are none."""
    total = sum(counts)
    return [c / total if total else 0.0 for c in counts]


@dataclass
class WeightRecord:
    """A layer's weights: bits, number of weights, uses per level, share clipped, share that changed level
    since the last record (None at the first), mean scale `S` (None where the method has none).
    """  # noqa: D205

    bits: int
    count: int
    usage: list[float]
    clipped: float
    changed: float | None
    scale: float | None

    def metrics(self) -> dict[str, float]:
        """Scalars by name."""
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
    """A layer's input, sampled: bits, uses per level, shares clipped below and above, histogram over
    `low .. high`; and of learned thresholds the scales, the widths, the thresholds, and how many widths
    are at the floor. Other methods have `curve`, the quantizer's value on an even grid from low to high.
    """  # noqa: D205

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
        """Scalars by name."""
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
        """The record that `dataclasses.asdict` made into plain values."""
        weight, activation = values["weight"], values["activation"]
        return cls(
            values["name"],
            None if weight is None else WeightRecord(**weight),
            None if activation is None else ActivationRecord(**activation),
        )

    def metrics(self) -> dict[str, float]:
        """Scalars by full name, `quant/<layer>/<what>`."""
        parts = [part.metrics() for part in (self.weight, self.activation) if part is not None]
        return {f"quant/{self.name}/{key}": value for part in parts for key, value in part.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, four significant digits, for a file."""
        return {key: _rounded(value) for key, value in asdict(self).items()}


def mean_metrics(records: Sequence[LayerRecord]) -> dict[str, float]:
    """Over layers: mean entropies and clipping, total dead levels and widths at the floor."""
    totals = ("weight_dead_levels", "activation_dead_levels", "widths_at_floor")
    means = ("weight_entropy", "activation_entropy", "weight_changed")
    metrics: dict[str, float] = {}
    each = [{key.rpartition("/")[2]: v for key, v in record.metrics().items()} for record in records]
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
