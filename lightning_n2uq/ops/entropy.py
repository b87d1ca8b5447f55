"""Histograms over quantization levels, hard and soft, and their entropy in bits."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST_SHARE = 1e-12  # keeps the slope of p log p finite at an empty level


def soft_histogram(position: Tensor, num_levels: int, ramp: float = 1.0) -> Tensor:
    """Returns counts per level in which a value between two levels belongs to both, in shares.

    A value at `k + f` gives level `k + 1` the share `clamp((f - 1/2) / u + 1/2, 0, 1)` and level `k` the
    rest: linear interpolation at `u = 1`, the histogram of the rounded positions as `u` goes to 0.

    Args:
        position: The values' positions `0 .. num_levels - 1`, of any shape, floating.
        num_levels: The number of levels, 2 or more.
        ramp: The ramp width `u`, above 0 and up to 1.

    Returns:
        The counts `[num_levels]`, which sum to `position.numel()`; differentiable in `position`.
    """
    position = position.flatten()
    lower = position.detach().floor().clamp(0, num_levels - 2)
    share = ((position - lower - 0.5) / ramp + 0.5).clamp(0.0, 1.0)
    index = lower.long()
    counts = position.new_zeros(num_levels)
    return counts.index_add(0, index, 1.0 - share).index_add(0, index + 1, share)


def hard_histogram(codes: Tensor, num_levels: int) -> Tensor:
    """Returns how often each level is used, `[num_levels]` int64, from level indices of any shape."""
    return torch.bincount(codes.flatten().long(), minlength=num_levels)


def entropy_bits(counts: Tensor) -> Tensor:
    """Returns `-sum p log2 p` in bits of the last dimension's counts, 0 without any; differentiable."""
    counts = counts if counts.dtype.is_floating_point else counts.double()
    share = counts / counts.sum(-1, keepdim=True).clamp_min(_SMALLEST_SHARE)
    return -(share * share.clamp_min(_SMALLEST_SHARE).log2()).sum(-1)
