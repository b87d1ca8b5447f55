"""What convolutions of integers by tiles share: padding, places of windows, and the call of the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.runtime.fast.tile import PIXELS
from lightning_n2uq.ops.backends.common.jit import array, run_chunks
from lightning_n2uq.utils import processor

_TILES = 16
"""Tiles of a group: a thread's share, whose codes fit the first cache."""


class TiledConvolution(ABC):
    """An `IntConv` on a map, whose sums are float32.

    Args:
        step: The layer, one that `takes` lets pass.
        weights: `[blocks, rows, ..., VECTORS, LANES, numbers]`, as the tile reads them.
    """

    loop: ClassVar[Any]
    """The compiled loop over tiles."""
    item: ClassVar[int]
    """Bytes of a number of the padded map."""

    def __init__(self, step: s.IntConv, weights: s.Array) -> None:
        self._window, self._kernel, self._outputs = step.window, step.weight.shape[2:], len(step.weight)
        self._weights = np.ascontiguousarray(weights)
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
        size = window.output_size((height, width), self._kernel)
        offsets = self._places(size, row, channels)
        padded = self._padded(codes, rows, row)
        y = torch.empty(samples, self._outputs, *size, memory_format=torch.channels_last)
        weights = self._weights
        addresses = np.array([padded.ctypes.data, weights.ctypes.data, y.data_ptr()], np.int64)
        sizes = np.array([*weights.shape[1:-3], weights[0].nbytes], np.int64)
        strides = self.item * np.array([rows * row, window.dilation[0] * row], np.int64)
        groups = max(1, len(offsets) // PIXELS // _TILES)
        sums = array(y.permute(0, 2, 3, 1)).reshape(samples, -1, self._outputs)
        arguments = addresses, offsets, sizes, strides, groups, sums
        run_chunks(type(self).loop, samples * len(weights) * groups, 1, *arguments)
        return y

    @abstractmethod
    def _padded(self, codes: Tensor, rows: int, row: int) -> s.Array:
        """Returns `rows` rows of `row` numbers per sample, behind which a tile may read."""

    def _places(self, size: tuple[int, int], row: int, channels: int) -> s.Array:
        """Returns at which byte each pixel's window begins, the last one again until tiles are whole."""
        key = (*size, row)
        if key not in self._offsets:
            down, across = self._window.stride
            places = np.arange(size[0])[:, None] * down * row + np.arange(size[1]) * across * channels
            places = np.pad(places.ravel(), (0, -places.size % PIXELS), mode="edge")
            self._offsets[key] = self.item * places.astype(np.int64)
        return self._offsets[key]
