"""Convolutions of codes of a few bits on x86 without VNNI, whose sums stay in 16 bits for a while."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.runtime.fast import byte_loops
from lightning_n2uq.export.runtime.fast.byte_tile import OUTPUTS, PIXELS, STEP, VECTORS
from lightning_n2uq.export.runtime.fast.vectors import LANES
from lightning_n2uq.ops.backends.common.jit import array, run_chunks
from lightning_n2uq.utils import processor

_LARGEST = 2**15 - 1
_SHORTEST = 16
"""Steps that a segment has at least, so that widening its sums takes little time."""
_TILES = 16
"""Tiles of a group: a thread's share, whose codes fit the first cache."""


class ByteConvolution:
    """An `IntConv` on a map, whose sums are float32.

    Args:
        step: The layer, one that `takes` lets pass.
    """

    def __init__(self, step: s.IntConv) -> None:
        self._window, self._kernel, self._outputs = step.window, step.weight.shape[2:], len(step.weight)
        segments = _segments(step)
        assert segments is not None  # `takes` has made sure
        self._weights = np.ascontiguousarray(_packed(step.weight, segments))
        self._offsets: dict[tuple[int, ...], s.Array] = {}

    @staticmethod
    def takes(step: s.IntConv) -> bool:
        """Returns whether it is exact here and quicker than oneDNN, which uses VNNI where there is any."""
        suits = step.weight.ndim == 4 and step.window.groups == 1 and step.window.dilation[1] == 1
        suits = suits and processor.has_vectors() and not processor.adds_bytes_exactly()
        return suits and not step.needs_float64 and _segments(step) is not None

    def __call__(self, codes: Tensor) -> Tensor:
        """Returns the sums of a dense map of codes, channels-last."""
        window, (samples, channels, height, width) = self._window, codes.shape
        top, left, bottom, right = window.pads
        rows, row = height + top + bottom, (width + left + right) * channels
        size = window.output_size((height, width), self._kernel)
        offsets = self._places(size, row, channels)
        padded = self._padded(codes, rows, row)
        y = torch.empty(samples, self._outputs, *size, memory_format=torch.channels_last)
        blocks, kernel_rows, segments, steps = self._weights.shape[:4]
        addresses = np.array([padded.ctypes.data, self._weights.ctypes.data, y.data_ptr()], np.int64)
        sizes = np.array([kernel_rows, segments, steps, self._weights[0].size], np.int64)
        strides = np.array([rows * row, window.dilation[0] * row], np.int64)
        groups = max(1, len(offsets) // PIXELS // _TILES)
        sums = array(y.permute(0, 2, 3, 1)).reshape(samples, -1, self._outputs)
        run_chunks(
            byte_loops.convolve_tiles, samples * blocks * groups, 1,
            addresses, offsets, sizes, strides, groups, sums,
        )  # fmt: skip
        return y

    def _padded(self, codes: Tensor, rows: int, row: int) -> s.Array:
        """Returns `rows` rows of `row` bytes per sample, behind which a kernel's row may be read."""
        samples, channels, height, width = codes.shape
        x = array(codes.permute(0, 2, 3, 1)).reshape(samples, height, width * channels)
        used = channels * self._kernel[1]
        if not any(self._window.pads) and used == np.prod(self._weights.shape[2:4]) * STEP:
            return x
        padded = np.empty(samples * rows * row + self._weights[0, 0].size, np.uint8)
        whole = padded[: samples * rows * row].reshape(samples, rows, row)
        top, left, _, _ = self._window.pads
        run_chunks(byte_loops.pad_rows, samples * rows, 64, x, top, left * channels, whole)
        return padded

    def _places(self, size: tuple[int, int], row: int, channels: int) -> s.Array:
        """Returns where each pixel's window begins, the last one again until tiles are whole."""
        key = (*size, row)
        if key not in self._offsets:
            down, across = self._window.stride
            places = np.arange(size[0])[:, None] * down * row + np.arange(size[1]) * across * channels
            places = np.pad(places.ravel(), (0, -places.size % PIXELS), mode="edge")
            self._offsets[key] = places.astype(np.int64)
        return self._offsets[key]


def _segments(step: s.IntConv) -> int | None:
    """Returns into how many segments a kernel's row is cut for 16 bits to hold sums, or None."""
    if np.abs(step.weight).max(initial=0) > 127:
        return None
    steps = -(-step.weight.shape[1] * step.weight.shape[3] // STEP)
    for segments in range(1, max(1, steps // _SHORTEST) + 1):
        packed = np.abs(_packed(step.weight, segments).astype(np.int32))
        # A lane of 16 bits adds up neighbouring pairs.
        lanes = packed.reshape(*packed.shape[:-1], 2, 2).sum((3, -1))
        if int(lanes.max(initial=0)) * step.levels <= _LARGEST:
            return segments
    return None


def _packed(weight: s.Array, segments: int) -> s.Array:
    """Returns int8 `[blocks, rows, segments, steps, VECTORS, LANES, STEP]`, filled up with zeros."""
    outputs, channels, height, width = weight.shape
    rows = weight.transpose(0, 2, 3, 1).reshape(outputs, height, width * channels)
    rows = np.pad(rows, ((0, -outputs % OUTPUTS), (0, 0), (0, -(width * channels) % (STEP * segments))))
    parts = rows.reshape(-1, VECTORS, LANES, height, segments, rows.shape[2] // segments // STEP, STEP)
    return parts.transpose(0, 3, 4, 5, 1, 2, 6).astype(np.int8)
