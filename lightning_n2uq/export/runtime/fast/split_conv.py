"""A split convolution in one pass, on 16-bit integers: all three products with sums in 32 bits.

Its results have the bits of the three float convolutions that `SplitConv` describes, since all sums are
exact. Multiplying pairs of 16-bit integers takes half the time of float products, the parts are read once,
and sums never leave the registers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.runtime.fast import image_loops, split_loops
from lightning_n2uq.export.runtime.fast.split_tile import PIXELS
from lightning_n2uq.export.runtime.fast.vectors import LANES
from lightning_n2uq.ops.backends.common.jit import array, run_chunks
from lightning_n2uq.utils import processor

_LARGEST = 2**15 - 1
_FEWEST_ROWS = 4
"""Fewer rows than this are not worth another thread."""


def sample_scales(x: Tensor, bits: int) -> Tensor:
    """Returns `max(max|x|, TINY) * 2^-bits` of every sample of a dense map, `[N]`."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    rows = (x.permute(0, 2, 3, 1) if last else x).reshape(len(x), -1).contiguous()
    largest = torch.empty(len(x), dtype=torch.int32)
    run_chunks(image_loops.largest, len(x), 1, array(rows.view(torch.int32)), array(largest))
    return largest.view(torch.float32).clamp_min(s.TINY) * 2.0**-bits


class Parts(NamedTuple):
    """An input's parts as 16-bit integers, and what `split_loops.convolve_rows` wants to know.

    Attributes:
        arrays: High and low parts, which the addresses point to.
        addresses: As `convolve_rows` describes them, like the following.
        sizes: Of the kernel.
        steps: Bytes from one part of the input to another.
    """

    arrays: tuple[s.Array, s.Array]
    addresses: s.Array
    sizes: s.Array
    steps: s.Array


class SplitConvolution:
    """A `SplitConv` on 16-bit integers.

    Args:
        step: The layer, one that `takes` lets pass.

    Attributes:
        step: As given.
        units: Values of a one in the low weights, and in the input's low parts.
    """

    def __init__(self, step: s.SplitConv) -> None:
        self.step = step
        places = _binary_places(step.low)
        assert places is not None  # `takes` has made sure
        low = np.rint(step.low * 2.0**places)
        self._weights = np.ascontiguousarray(np.stack([_rows(step.high), _rows(low)], 3))
        self.units = np.float32(2.0**-places), np.float32(2.0**-step.low_bits)

    @staticmethod
    def takes(step: s.SplitConv) -> bool:
        """Returns whether this processor has the instructions, and 16 bits hold all parts."""
        places = _binary_places(step.low)
        if places is None or not processor.has_vectors():
            return False
        largest = max(np.abs(step.high).max(initial=0), np.abs(step.low).max(initial=0) * 2.0**places)
        inputs = max(2.0**step.high_bits, 2.0 ** (step.low_bits - 1))
        window = step.window
        return bool(max(largest, inputs) <= _LARGEST) and window.groups == 1 and window.dilation[1] == 1

    def scales(self, x: Tensor) -> Tensor:
        """Returns the numbers by which samples are divided."""
        return sample_scales(x, self.step.high_bits)

    def __call__(self, x: Tensor, scales: Tensor, y: Tensor | None = None) -> Tensor:
        """Returns the output, channels-last.

        Args:
            x: Dense images `[N, C, H, W]`.
            scales: Their scales, finite.
            y: Where the output goes, channels-last; made if None.
        """
        parts = self.parts(x, scales)
        if y is None:
            size = self.step.window.output_size(tuple(x.shape[2:]), self.step.high.shape[2:])
            y = torch.empty(len(x), len(self.step.high), *size, memory_format=torch.channels_last)
        rows = array(y.permute(0, 2, 3, 1))
        arguments = parts.addresses, parts.sizes, parts.steps, array(scales.reshape(-1)), *self.units, rows
        run_chunks(split_loops.convolve_rows, len(x) * rows.shape[1], _FEWEST_ROWS, *arguments)
        return y

    def parts(self, x: Tensor, scales: Tensor) -> Parts:
        """Returns the parts of dense images `[N, C, H, W]`, and where `split_loops` finds all it needs."""
        window, kernel = self.step.window, self.step.high.shape
        top, left, bottom, right = window.pads
        samples, channels, height, width = x.shape
        rows, row = height + top + bottom, (width + left + right) * channels
        high, low = (_spacious(samples * rows * row, self._reach(channels)) for _ in range(2))
        pixels = array(x.permute(0, 2, 3, 1)).reshape(samples, height, width * channels)
        parts = [part[: samples * rows * row].reshape(samples, rows, row) for part in (high, low)]
        arguments = array(scales.reshape(-1)), self.step.low_bits, top, left * channels
        run_chunks(split_loops.split_rows, samples * rows, 16, pixels, *arguments, *parts)
        steps = rows * row, window.stride[0] * row, window.stride[1] * channels, window.dilation[0] * row
        return Parts(
            (high, low),
            np.array([array.ctypes.data for array in (high, low, self._weights)], np.int64),
            np.array([kernel[2], self._weights.shape[2]], np.int64),
            2 * np.array(steps, np.int64),
        )

    def _reach(self, channels: int) -> int:
        """Returns how far behind the last window a tile may read: its other pixels, and half a pair."""
        return PIXELS * self.step.window.stride[1] * channels + 2


def _spacious(size: int, more: int) -> s.Array:
    return np.empty(size + more, np.int16)


def _binary_places(low: s.Array) -> int | None:
    """Returns how many binary places the numbers have, or None if more than float32 has."""
    for places in range(25):
        scaled = low * 2.0**places
        if (scaled == np.rint(scaled)).all():
            return places
    return None


def _rows(weight: s.Array) -> s.Array:
    """Returns weights `[O, C, kh, kw]` as int16 `[O / LANES, kh, pairs, LANES, 2]`, filled up with zeros."""
    outputs, channels, height, width = weight.shape
    rows = weight.transpose(0, 2, 3, 1).reshape(outputs, height, width * channels)
    rows = np.pad(rows, ((0, -outputs % LANES), (0, 0), (0, width * channels % 2)))
    pairs = rows.reshape(-1, LANES, height, rows.shape[2] // 2, 2)
    return pairs.transpose(0, 2, 3, 1, 4).astype(np.int16)
