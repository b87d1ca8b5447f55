"""Convolutions of signed bytes on x86: products of 16-bit integers, whose sums stay in 32 bits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.runtime.fast import word_loops
from lightning_n2uq.export.runtime.fast.vectors import LANES
from lightning_n2uq.export.runtime.fast.word_tile import OUTPUTS, PIXELS, VECTORS
from lightning_n2uq.ops.backends.common.jit import array, run_chunks
from lightning_n2uq.utils import processor

_TILES = 16
"""Tiles of a group: a thread's share, whose codes fit the first cache."""


class WordConvolution:
    """An `IntConv` on a map of bytes, signed or not, whose sums are float32.

    Args:
        step: The layer, one that `takes` lets pass.
    """

    def __init__(self, step: s.IntConv) -> None:
        self._window, self._kernel, self._outputs = step.window, step.weight.shape[2:], len(step.weight)
        self._weights = np.ascontiguousarray(_packed(step.weight))
        self._offsets: dict[tuple[int, ...], s.Array] = {}

    @staticmethod
    def takes(step: s.IntConv) -> bool:
        """Returns whether this processor has the instructions for it, and sums are exact."""
        suits = step.weight.ndim == 4 and step.window.groups == 1 and step.window.dilation[1] == 1
        return suits and processor.has_vectors() and not step.needs_float64

    def __call__(self, codes: Tensor) -> Tensor:
        """Returns the sums of a dense map, channels-last."""
        window, (samples, channels, height, width) = self._window, codes.shape
        top, left, bottom, right = window.pads
        rows, row = height + top + bottom, (width + left + right) * channels
        # Behind the last row a tile may read half a pair.
        padded = np.zeros(samples * rows * row + 1, np.int16)
        whole = padded[:-1].reshape(samples, rows, row)
        x = array(codes.permute(0, 2, 3, 1)).reshape(samples, height, width * channels)
        run_chunks(word_loops.widen_rows, samples * rows, 64, x, top, left * channels, whole)
        size = window.output_size((height, width), self._kernel)
        offsets = self._places(size, row, channels)
        y = torch.empty(samples, self._outputs, *size, memory_format=torch.channels_last)
        blocks, kernel_rows, pairs = self._weights.shape[:3]
        addresses = np.array([padded.ctypes.data, self._weights.ctypes.data, y.data_ptr()], np.int64)
        sizes = np.array([kernel_rows, pairs, self._weights[0].nbytes], np.int64)
        strides = 2 * np.array([rows * row, window.dilation[0] * row], np.int64)
        groups = max(1, len(offsets) // PIXELS // _TILES)
        sums = array(y.permute(0, 2, 3, 1)).reshape(samples, -1, self._outputs)
        run_chunks(
            word_loops.convolve_tiles, samples * blocks * groups, 1,
            addresses, offsets, sizes, strides, groups, sums,
        )  # fmt: skip
        return y

    def _places(self, size: tuple[int, int], row: int, channels: int) -> s.Array:
        """Returns at which byte each pixel's window begins, the last one again until tiles are whole."""
        key = (*size, row)
        if key not in self._offsets:
            down, across = self._window.stride
            places = np.arange(size[0])[:, None] * down * row + np.arange(size[1]) * across * channels
            places = np.pad(places.ravel(), (0, -places.size % PIXELS), mode="edge")
            self._offsets[key] = 2 * places.astype(np.int64)
        return self._offsets[key]


def _packed(weight: s.Array) -> s.Array:
    """Returns int16 `[blocks, rows, pairs, VECTORS, LANES, 2]`, filled up with zeros."""
    outputs, channels, height, width = weight.shape
    rows = weight.transpose(0, 2, 3, 1).reshape(outputs, height, width * channels)
    rows = np.pad(rows, ((0, -outputs % OUTPUTS), (0, 0), (0, width * channels % 2)))
    pairs = rows.reshape(-1, VECTORS, LANES, height, rows.shape[2] // 2, 2)
    return pairs.transpose(0, 3, 4, 1, 2, 5).astype(np.int16)
