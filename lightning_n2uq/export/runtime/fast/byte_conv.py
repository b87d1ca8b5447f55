"""Convolutions of codes of a few bits on x86 without VNNI, whose sums stay in 16 bits for a while."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.runtime.fast import byte_loops
from lightning_n2uq.export.runtime.fast.byte_tile import STEP
from lightning_n2uq.export.runtime.fast.tile import OUTPUTS, VECTORS
from lightning_n2uq.export.runtime.fast.tiled_conv import TiledConvolution
from lightning_n2uq.export.runtime.fast.vectors import LANES
from lightning_n2uq.ops.backends.common.jit import array, run_chunks
from lightning_n2uq.utils import processor

_LARGEST = 2**15 - 1
_SHORTEST = 16
"""Steps that a segment has at least, so that widening its sums takes little time."""


class ByteConvolution(TiledConvolution):
    """An `IntConv` of codes of a few bits, whose sums are float32.

    Args:
        step: The layer, one that `takes` lets pass.
    """

    loop = byte_loops.convolve_tiles
    item = 1

    def __init__(self, step: s.IntConv) -> None:
        segments = _segments(step)
        assert segments is not None  # `takes` has made sure
        super().__init__(step, _packed(step.weight, segments))

    @staticmethod
    def takes(step: s.IntConv) -> bool:
        """Returns whether it is exact here and quicker than oneDNN, which uses VNNI where there is any."""
        suits = TiledConvolution.takes(step) and not processor.adds_bytes_exactly()
        return suits and _segments(step) is not None

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


def _segments(step: s.IntConv) -> int | None:
    """Returns into how many segments a kernel's row is cut for 16 bits to hold sums, or None."""
    if np.abs(step.weight).max(initial=0) > 127:
        return None
    sums = _lane_sums(step.weight)
    steps = sums.shape[2] - 1
    for segments in range(1, max(1, steps // _SHORTEST) + 1):
        ends = np.minimum(np.arange(segments + 1) * -(-steps // segments), steps)
        largest = int(np.diff(sums[:, :, ends], axis=2).max(initial=0))
        if largest * step.levels <= _LARGEST:
            return segments
    return None


def _lane_sums(weight: s.Array) -> s.Array:
    """Returns what both lanes of 16 bits add up at most in front of a step, `[O, rows, steps + 1, 2]`.

    A step has four neighbouring numbers of a kernel's row, a lane two of them.
    """
    outputs, channels, height, width = weight.shape
    rows = np.abs(weight).astype(np.uint8).transpose(0, 2, 3, 1).reshape(outputs, height, width * channels)
    rows = np.pad(rows, ((0, 0), (0, 0), (STEP, -(width * channels) % STEP)))
    pairs = rows[..., 0::2] + rows[..., 1::2]
    return pairs.reshape(outputs, height, -1, 2).cumsum(2, dtype=np.int32)


def _packed(weight: s.Array, segments: int) -> s.Array:
    """Returns int8 `[blocks, rows, segments, steps, VECTORS, LANES, STEP]`, filled up with zeros."""
    outputs, channels, height, width = weight.shape
    rows = weight.transpose(0, 2, 3, 1).reshape(outputs, height, width * channels)
    rows = np.pad(rows, ((0, -outputs % OUTPUTS), (0, 0), (0, -(width * channels) % (STEP * segments))))
    parts = rows.reshape(-1, VECTORS, LANES, height, segments, rows.shape[2] // segments // STEP, STEP)
    return parts.transpose(0, 3, 4, 5, 1, 2, 6).astype(np.int8)
