"""Differences that are computed again in the backward pass, instead of being kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_AGAIN = object()


@contextmanager
def recomputed(difference: Tensor, x: Tensor, subtrahend: Tensor) -> Iterator[None]:
    """Lets operators inside that save `difference` for their backward pass save nothing in its place.

    Args:
        difference: `x - subtrahend`.
        x: A map that is kept anyway; changing it in place before the backward pass is an error.
        subtrahend: What was subtracted, `[1]`.
    """
    place, shape = difference.data_ptr(), difference.shape
    kept, taken, version = x.detach(), subtrahend.detach(), x._version

    def pack(saved: Tensor) -> object:
        return _AGAIN if saved.data_ptr() == place and saved.shape == shape else saved

    def unpack(saved: object) -> Tensor:
        if saved is not _AGAIN:
            assert isinstance(saved, Tensor)
            return saved
        if kept._version != version:
            raise RuntimeError(
                "the input of a quantized convolution has been modified by an inplace operation before the "
                "backward pass, which needs it"
            )
        return kept - taken

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
