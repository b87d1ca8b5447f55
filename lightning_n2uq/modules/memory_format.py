"""The order of a network's maps in memory, which changes its speed and nothing of what it computes."""

from __future__ import annotations

from torch import Tensor, channels_last, contiguous_format

MEMORY_FORMATS = {"contiguous": contiguous_format, "channels_last": channels_last}


def in_format(images: Tensor, name: str) -> Tensor:
    """Returns `[N, C, H, W]` in that order of memory, and anything else as it is."""
    return images.contiguous(memory_format=MEMORY_FORMATS[name]) if images.dim() == 4 else images
