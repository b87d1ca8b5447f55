"""What figures of a quantized layer show, in numbers: for the monitor's pictures and the report's plots."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from lightning_n2uq.ops.tables import OUTPUT_RANGE, WIDTH_FLOOR
from lightning_n2uq.report.layer_record import ActivationRecord, shares

Points = tuple[list[float], list[float]]


def knots(start: float, widths: Sequence[float]) -> list[float]:
    """Returns the ends of the surrogate's segments, one more than there are widths."""
    return list(accumulate((max(width, WIDTH_FLOOR) for width in widths), initial=start))


def thresholds(start: float, widths: Sequence[float]) -> list[float]:
    """Returns the middle of each of the surrogate's segments."""
    ends = knots(start, widths)
    return [left + max(width, WIDTH_FLOOR) / 2 for left, width in zip(ends, widths, strict=False)]


def staircase_points(activation: ActivationRecord) -> Points:
    """Returns the corners of the deployed staircase `beta D q` from `low` to `high`, or the sampled curve."""
    if not activation.thresholds:
        count = max(len(activation.curve) - 1, 1)
        span = activation.high - activation.low
        return [activation.low + span * i / count for i in range(len(activation.curve))], activation.curve
    step = activation.scale_out * OUTPUT_RANGE / len(activation.thresholds)
    x, y = [activation.low], [0.0]
    for k, threshold in enumerate(activation.thresholds):
        x += [threshold, threshold]
        y += [k * step, (k + 1) * step]
    return [*x, activation.high], [*y, len(activation.thresholds) * step]


def surrogate_points(activation: ActivationRecord) -> Points:
    """Returns the knots of `beta h` from `low` to `high`; nothing for methods that learn no thresholds."""
    if not activation.widths:
        return [], []
    step = activation.scale_out * OUTPUT_RANGE / len(activation.widths)
    x = [activation.low, *knots(activation.start, activation.widths), activation.high]
    levels = [k * step for k in range(len(activation.widths) + 1)]
    return x, [0.0, *levels, levels[-1]]


def input_bars(activation: ActivationRecord) -> tuple[list[float], list[float], float]:
    """Returns the middles, the heights (shares of the sample) and the width of the histogram's bars."""
    width = (activation.high - activation.low) / len(activation.histogram)
    middles = [activation.low + (i + 0.5) * width for i in range(len(activation.histogram))]
    return middles, shares(activation.histogram), width


def input_label(activation: ActivationRecord) -> str:
    """Returns the title of the axis that staircase and histogram share."""
    return "scaled input" if activation.thresholds else "input"


def entropy_range(values: Sequence[float]) -> tuple[float, float]:
    """Returns the ends of a colour scale over entropies.

    It spans at least the upper tenth of the range, so that small differences do not look large.
    """
    return min(*values, 0.9 * max(values)), max(*values, 1e-3)
