"""Corner points of a quantizer's staircase and surrogate, for whoever draws them."""

from __future__ import annotations

from lightning_n2uq.ops.tables import OUTPUT_RANGE, WIDTH_FLOOR
from lightning_n2uq.report.layer_record import ActivationRecord

Points = tuple[list[float], list[float]]


def staircase_points(activation: ActivationRecord) -> Points:
    """Corners of the deployed staircase `beta D q` from `low` to `high`, or the sampled curve."""
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


def surrogate_points(activation: ActivationRecord) -> Points | None:
    """Knots of `beta h` from `low` to `high`; None for methods without a surrogate of their own."""
    if not activation.widths:
        return None
    step = activation.scale_out * OUTPUT_RANGE / len(activation.widths)
    x, y = [activation.low, activation.start], [0.0, 0.0]
    for k, width in enumerate(activation.widths):
        x.append(x[-1] + max(width, WIDTH_FLOOR))
        y.append((k + 1) * step)
    return [*x, activation.high], [*y, y[-1]]
