"""Flat views in memory order, so that kernels see one contiguous run whatever the layout."""

from __future__ import annotations

import torch
from torch import Tensor


def flat(x: Tensor) -> Tensor:
    """Returns the 1-D view `[numel]` of a dense tensor (`torch.empty_like` makes one) in memory order."""
    return x.as_strided((x.numel(),), (1,))


def flat_like(x: Tensor, like: Tensor) -> Tensor:
    """Returns the 1-D run of `x`'s values in the memory order of the dense tensor `like` (same shape).

    A view where the strides agree (contiguous, channels-last), a copy where they do not.
    """
    if x.stride() != like.stride():
        x = torch.empty_like(like, dtype=x.dtype).copy_(x)
    return flat(x)


def is_one_run(x: Tensor) -> bool:
    """Returns whether `x` is one run of memory, channel (dim 0) after channel."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
