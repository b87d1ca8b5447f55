"""Pooling of maps of bytes as the fast engine runs it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.export.ir.integer_steps import IntMaxPool
from lightning_n2uq.export.runtime.fast import integer_loops
from lightning_n2uq.ops.backends.common.jit import array, run_chunks

_FEWEST_ROWS = 8
"""Fewer rows than this are not worth another thread."""


class BytePool:
    """An `IntMaxPool` of a dense map, channels-last.

    Args:
        step: The step.
    """

    def __init__(self, step: IntMaxPool) -> None:
        self._step = step
        window = step.window
        sizes = (step.kernel, window.stride, window.pads[:2], window.dilation)
        self._places = [np.array(size, np.int64) for size in sizes]

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the pooled map."""
        samples, channels, height, width = x.shape
        size = self._step.window.output_size((height, width), self._step.kernel)
        y = torch.empty(samples, channels, *size, dtype=torch.uint8, memory_format=torch.channels_last)
        rows = array(x.permute(0, 2, 3, 1)).reshape(samples, height, width * channels)
        target = array(y.permute(0, 2, 3, 1))
        run_chunks(integer_loops.pool_rows, samples * size[0], _FEWEST_ROWS, rows, *self._places, target)
        return y


def sum_pool(x: Tensor) -> Tensor:
    """Returns a `SumPool` of a dense map of bytes, `[N, C, 1, 1]` float32; sums stay below 2^24."""
    samples, channels, height, width = x.shape
    pixels = array(x.permute(0, 2, 3, 1)).reshape(samples, height * width, channels)
    y = torch.empty(samples, channels)
    run_chunks(integer_loops.sum_pixels, samples, 1, pixels, array(y))
    return y[:, :, None, None]
