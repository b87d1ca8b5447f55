"""The range that a uniform quantizer should cover: least mean squared error over a sample."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

SAMPLE = 16384
"""The number of values looked at per tensor."""

_SHARES = 24


def sample_values(x: Tensor, size: int = SAMPLE) -> Tensor:
    """Returns up to `size` values of `x`, evenly spread, 1-D and at least float32."""
    flat = x.detach().reshape(-1)
    values = flat[:: max(1, flat.numel() // size)][:size]
    return values if values.dtype == torch.float64 else values.float()


def quantize_uniformly(x: Tensor, low: Tensor, high: Tensor, levels: int) -> Tensor:
    """Returns the nearest of `levels` equidistant values from `low` to `high`, without a gradient."""
    step = (high - low) / (levels - 1)
    return torch.round((x.clamp(low, high) - low) / step) * step + low


def best_range(sample: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Returns the range whose `levels` equidistant values fit `sample` best, shrinking one end at a time.

    A sample without negative values starts at 0, so that zero stays a level.

    Args:
        sample: At least one value, all finite, `[S]`.
        levels: The number of levels, at least 2.

    Returns:
        The lower and the upper end, 0-d, the upper one strictly above.

    Raises:
        ValueError: The sample is empty or has values that are not finite.
    """
    _check(sample)
    low, high = sample.min().clamp_max(0), sample.max().clamp_min(0)
    high = torch.maximum(high, low + 1e-3)  # a sample of zeros
    for _ in range(2):  # the best lower end depends a little on the upper one
        high = min(_shrunk(high), key=lambda end: _error(sample, low, end, levels))
        low = min(_shrunk(low), key=lambda end: _error(sample, end, high, levels))
    return low, high


def best_symmetric_range(sample: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Returns the range with one level more below zero than above whose levels fit `sample` best.

    Args and returns are those of `best_range`; zero is a level whatever the sample is.
    """
    _check(sample)
    half = levels // 2
    largest = torch.maximum(-sample.min() / half, sample.max() / max(half - 1, 1)).clamp_min(1e-3 / levels)
    steps = list(_shrunk(largest))
    step = min(steps, key=lambda x: _error(sample, -half * x, (half - 1) * x, levels))
    return -half * step, (half - 1) * step


def _check(sample: Tensor) -> None:
    if sample.numel() == 0 or not bool(sample.isfinite().all()):
        raise ValueError("sample: is empty or has values that are not finite, allowed is finite data")


def _shrunk(end: Tensor) -> Iterable[Tensor]:
    return (end * (i / _SHARES) for i in range(_SHARES, 0, -1))


def _error(sample: Tensor, low: Tensor, high: Tensor, levels: int) -> float:
    return float((quantize_uniformly(sample, low, high, levels) - sample).square().mean())
