"""How many channels of an integer-only network `QLinearConv` could compute without a differing code.

    python -m benchmarks.requantization           # ResNet-18 of random weights, W2A2 and W4A4; a minute

ONNX's `QLinearConv` ends in `clip(round(float32(sum + bias) * scale) + zero)`, bias and zero being integers
and the scale one number per channel. Its steps can only be moved by whole sums, while those of a trained grid
lie anywhere. Weights multiplied by a factor (as long as they fit a byte) divide a sum's unit by it. A channel
is counted if some factor, bias and scale put every step between the two sums where its threshold is. Its
scale is taken as a real number: rounding it could only lose channels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.integer_steps import GridCodes

_SCALES = 4001
"""Scales that are tried, evenly spaced in the interval in which the true one lies."""


def fits(thresholds: NDArray[np.int64], codes: NDArray[np.int64], factors: range) -> int | None:
    """Returns the smallest factor with which one channel is exact, None if none is.

    Args:
        thresholds: `[n]`, the last sums with the codes `codes`, increasing; those that sums can pass.
        codes: `[n]`.
        factors: What weights may be multiplied by.
    """
    if len(thresholds) < 2:
        return factors[0]
    places = codes + 0.5
    span, count = float(thresholds[-1] - thresholds[0]), float(places[-1] - places[0])
    distances = np.linspace(max(span - 1, 1e-9), span + 1, _SCALES)[:, None] / count  # sums per code
    # A step lies behind the threshold, and not behind the next sum.
    ends = places * distances - thresholds
    low, high = (ends - 1).max(1), ends.min(1)
    low, high = low[low < high], high[low < high]
    return next((f for f in factors if (np.floor(low * f) + 1 < high * f - 1e-9).any()), None)


def channels(layer: s.IntConv, step: GridCodes) -> tuple[int, int, int]:
    """Returns how many channels are exact as they are, how many with some factor, and all."""
    bound, count = layer.bound(), len(layer.weight)
    table = np.broadcast_to(step.thresholds, (count, step.levels)).astype(np.int64)
    factors = range(1, 127 // int(np.abs(layer.weight).max(initial=1)) + 1)
    found = []
    for row, limit in zip(table, bound, strict=True):
        inside = (row >= -limit) & (row < limit)
        found.append(fits(row[inside], np.arange(step.levels)[inside] + step.low, factors))
    return found.count(1), sum(factor is not None for factor in found), count


def layers(description: Description) -> dict[str, tuple[int, int, int]]:
    """Returns `channels` of every convolution whose sums become codes on a grid, by the codes' name."""
    by_name = {step.name: step for step in description.steps}
    pairs = [(by_name[step.inputs[0]], step) for step in description.steps if isinstance(step, GridCodes)]
    return {step.name: channels(layer, step) for layer, step in pairs if isinstance(layer, s.IntConv)}


def main() -> None:
    """Prints the table."""
    from benchmarks.export_engines import integer_network

    for bits in (2, 4):
        found = layers(integer_network(bits, 64, 8))
        print(f"ResNet-18 W{bits}A{bits}, integer-only: channels that QLinearConv computes exactly")
        for name, (plain, scaled, count) in found.items():
            print(f"  {name:<18} {plain:>4} as they are, {scaled:>4} with multiplied weights, of {count}")
        plain, scaled, count = (sum(row[i] for row in found.values()) for i in range(3))
        whole = sum(row[1] == row[2] for row in found.values())
        print(f"  all: {plain / count:.3f}, {scaled / count:.3f}; whole layers: {whole} of {len(found)}")


if __name__ == "__main__":
    main()
