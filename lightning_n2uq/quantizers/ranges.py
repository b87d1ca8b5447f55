"""The range that a uniform quantizer should cover: least mean squared error over a sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE = 16384
"""The number of values looked at per tensor."""

_SHARES = 24


def sample_values(x: Tensor, size: int = SAMPLE) -> Tensor:
    """Returns up to `size` values of `x`, evenly spread, 1-D and at least float32."""
    return sample_rows(x.reshape(1, -1), size)[0]


def sample_rows(x: Tensor, size: int) -> Tensor:
    """Returns up to `size` values of every row of `x` `[R, N]`, evenly spread and at least float32."""
    values = x.detach()[:, :: max(1, x.shape[1] // size)][:, :size]
    return values if values.dtype == torch.float64 else values.float()


def quantize_uniformly(x: Tensor, low: Tensor, high: Tensor, levels: int) -> Tensor:
    """Returns the nearest of `levels` equidistant values from `low` to `high`, without a gradient."""
    step = (high - low) / (levels - 1)
    return torch.round((x.clamp(low, high) - low) / step) * step + low


def full_range(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the range of all values of a sample and 0, as `best_range` does; NaN stays NaN."""
    low, high = sample.amin(-1).clamp_max(0), sample.amax(-1).clamp_min(0)
    return low, torch.maximum(high, low + 1e-3)  # a sample of zeros


def best_range(sample: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Returns the range whose `levels` equidistant values fit `sample` best, shrinking one end at a time.

    Zero lies in every range, and a sample without negative values starts there, so that zero stays a level.

    Args:
        sample: At least one value, all finite, `[S]`; or of several ranges, `[..., S]`.
        levels: The number of levels, at least 2.

    Returns:
        The lower and the upper end, `[...]`, the upper one strictly above.

    Raises:
        ValueError: The sample is empty or has values that are not finite.
    """
    _check(sample)
    return fitted_range(sample, levels)


def fitted_range(sample: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Returns what `best_range` does, and asks nothing of the values: it can be traced."""
    low, high = full_range(sample)
    values = _Sorted(sample)
    for _ in range(2):  # the best lower end depends a little on the upper one
        ends = _shares(high)
        high = _best(ends, values.errors(low.unsqueeze(-1), ends, levels))
        ends = _shares(low)
        low = _best(ends, values.errors(ends, high.unsqueeze(-1), levels))
    return low, high


def best_symmetric_range(sample: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Returns the range with one level more below zero than above whose levels fit `sample` best.

    Args and returns are those of `best_range`; zero is a level whatever the sample is.
    """
    _check(sample)
    half = levels // 2
    below, above = -sample.amin(-1) / half, sample.amax(-1) / max(half - 1, 1)
    steps = _shares(torch.maximum(below, above).clamp_min(1e-3 / levels))
    step = _best(steps, _Sorted(sample).errors(-half * steps, (half - 1) * steps, levels))
    return -half * step, (half - 1) * step


def _check(sample: Tensor) -> None:
    if sample.numel() == 0 or not bool(sample.isfinite().all()):
        raise ValueError("sample: is empty or has values that are not finite, allowed is finite data")


def _shares(end: Tensor) -> Tensor:
    """Returns candidates `[..., C]` for ends `[...]`, the whole first."""
    return end.unsqueeze(-1) * (torch.arange(_SHARES, 0, -1, device=end.device, dtype=end.dtype) / _SHARES)


def _best(candidates: Tensor, errors: Tensor) -> Tensor:
    """Returns the candidate with the smallest error, the first of equal ones."""
    return candidates.gather(-1, errors.argmin(-1, keepdim=True)).squeeze(-1)


class _Sorted:
    """A sample in order with running sums, by which an error takes a search for each level, not each value.

    Args:
        sample: `[..., S]`.
    """

    def __init__(self, sample: Tensor) -> None:
        self.values = sample.double().sort(-1).values
        self.sums = [F.pad(self.values.pow(power).cumsum(-1), (1, 0)) for power in (0, 1, 2)]

    def errors(self, low: Tensor, high: Tensor, levels: int) -> Tensor:
        """Returns the squared error of `levels` values from `low` to `high`, `[..., C]` or `[..., 1]` each.

        Between two levels' middles lie `n` values `x` that become one level `l`: their error is the sum of
        `x^2 - 2 l x + l^2`.
        """
        low, high = torch.broadcast_tensors(low.double().unsqueeze(-1), high.double().unsqueeze(-1))
        level = low + (high - low) / (levels - 1) * torch.arange(levels, device=low.device)
        middles = (level[..., 1:] + level[..., :-1]) / 2
        places = torch.searchsorted(self.values, middles.flatten(-2)).view(middles.shape)
        last = places.new_full((*places.shape[:-1], 1), self.values.shape[-1])
        cuts = torch.cat([F.pad(places, (1, 0)), last], -1)
        count, first, second = (self._between(sums, cuts) for sums in self.sums)
        return (second - 2 * level * first + level.square() * count).sum(-1)

    @staticmethod
    def _between(sums: Tensor, cuts: Tensor) -> Tensor:
        """Returns the sums of values between neighbouring cuts, `[..., C, levels]`."""
        return sums.gather(-1, cuts.flatten(-2)).view(cuts.shape).diff(dim=-1)
