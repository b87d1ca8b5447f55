"""How large a gradient's coordinates are, relative to their bucket's norm: a histogram and its integrals."""

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.ops.backends.reference.gradient_codec import bucket_norms
from lightning_n2uq.ops.formats.gradient_codec import Norm

_PER_OCTAVE = 16
_OCTAVES = 24
BINS = _PER_OCTAVE * _OCTAVES + 1
_SHIFT = 19  # leaves four bits of a float's mantissa: sixteen bins per octave
_LOWEST = (127 - _OCTAVES) << (23 - _SHIFT)
_SAMPLE = 1 << 20
_GOLDEN = (1 + math.sqrt(5)) / 2


def magnitude_histogram(x: Tensor, bucket_size: int, norm: Norm) -> Tensor:
    """Returns how often each magnitude `|v_i| / ||v||` occurs, weighted by `||v||^2`: fp64 `[BINS]`.

    Bin 0 is what lies below `2**-24`, then sixteen bins per octave follow. Of a long gradient every so many
    buckets are counted, a million coordinates in all. Buckets that are not finite, zero or incomplete are
    left out.

    Args:
        x: The gradient, fp32, 1-D.
        bucket_size: The number of coordinates per bucket.
        norm: The norm of a bucket.
    """
    rows = x[: x.numel() // bucket_size * bucket_size].view(-1, bucket_size)
    rows = rows[:: max(1, rows.numel() // _SAMPLE)]
    norms = bucket_norms(rows, norm)
    rows, norms = rows[torch.isfinite(norms) & (norms > 0)], norms[torch.isfinite(norms) & (norms > 0)]
    ratio = (rows.abs() / norms.unsqueeze(1)).clamp(max=1.0 - 2.0**-20)
    place = ((ratio.view(torch.int32) >> _SHIFT) - _LOWEST + 1).clamp(min=0)
    weights = norms.double().square().unsqueeze(1).expand_as(place)
    return torch.bincount(place.view(-1), weights.reshape(-1), minlength=BINS)


class Magnitudes:
    """A distribution of magnitudes from 0 to 1, with a constant density in every bin.

    Args:
        histogram: The share of every bin, fp64 `[BINS]`.
    """

    def __init__(self, histogram: Tensor) -> None:
        octaves = 2.0 ** np.arange(-_OCTAVES, 0).repeat(_PER_OCTAVE)
        within = 1 + np.tile(np.arange(_PER_OCTAVE), _OCTAVES) / _PER_OCTAVE
        self._edges = np.concatenate([[0.0], octaves * within, [1.0]])
        shares = histogram.cpu().numpy()
        self._density = shares / np.diff(self._edges)
        self._integrals = [self._cumulated(power) for power in range(3)]

    def _cumulated(self, power: int) -> np.ndarray:
        pieces = self._density * np.diff(self._edges ** (power + 1)) / (power + 1)
        return np.concatenate([[0.0], np.cumsum(pieces)])

    def _integral(self, x: float, power: int) -> float:
        """Returns the integral of `r**power` up to `x`."""
        index = min(int(np.searchsorted(self._edges, x, side="right")) - 1, BINS - 1)
        low = self._edges[index]
        rest = self._density[index] * (x ** (power + 1) - low ** (power + 1)) / (power + 1)
        return float(self._integrals[power][index] + rest)

    def share(self, x: float) -> float:
        """Returns the share of magnitudes up to `x`."""
        return self._integral(x, 0)

    def moment(self, x: float) -> float:
        """Returns the integral of the magnitudes up to `x`."""
        return self._integral(x, 1)

    def quantile(self, share: float) -> float:
        """Returns the magnitude up to which the given share lies."""
        return float(np.interp(share, self._integrals[0], self._edges))

    def variance(self, levels: list[float]) -> float:
        """Returns the expected variance of stochastic rounding between levels."""
        total = 0.0
        for a, c in itertools.pairwise(levels):
            mass, first, second = (self._integral(c, k) - self._integral(a, k) for k in range(3))
            total += (a + c) * first - second - a * c * mass
        return total

    def best_multiples(self, steps: int) -> list[float]:
        """Returns the levels `0, p**steps, .., p, 1` of the `p` that gives the least variance."""
        low, high = 0.02, 0.98
        for _ in range(60):  # a golden-section search
            first, second = high - (high - low) / _GOLDEN, low + (high - low) / _GOLDEN
            if self.variance(_multiples(first, steps)) < self.variance(_multiples(second, steps)):
                high = second
            else:
                low = first
        return _multiples((low + high) / 2, steps)


def _multiples(p: float, steps: int) -> list[float]:
    return [0.0, *(p ** (steps - index) for index in range(steps)), 1.0]
