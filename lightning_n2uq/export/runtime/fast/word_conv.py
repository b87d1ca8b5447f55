"""Convolutions of signed bytes on x86: products of 16-bit integers, whose sums stay in 32 bits."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.runtime.fast import word_loops
from lightning_n2uq.export.runtime.fast.tile import OUTPUTS, VECTORS
from lightning_n2uq.export.runtime.fast.tiled_conv import TiledConvolution
from lightning_n2uq.export.runtime.fast.vectors import LANES
from lightning_n2uq.ops.backends.common.jit import array, run_chunks


class WordConvolution(TiledConvolution):
    """An `IntConv` of bytes, signed or not, whose sums are float32.

    Args:
        step: The layer, one that `takes` lets pass.
    """

    loop = word_loops.convolve_tiles
    item = 2

    def __init__(self, step: s.IntConv) -> None:
        super().__init__(step, _packed(step.weight))

    def _padded(self, codes: Tensor, rows: int, row: int) -> s.Array:
        """Returns rows of int16; behind the last one a tile may read half a pair."""
        samples, channels, height, width = codes.shape
        top, left, _, _ = self._window.pads
        padded = np.zeros(samples * rows * row + 1, np.int16)
        whole = padded[:-1].reshape(samples, rows, row)
        x = array(codes.permute(0, 2, 3, 1)).reshape(samples, height, width * channels)
        run_chunks(word_loops.widen_rows, samples * rows, 64, x, top, left * channels, whole)
        return padded


def _packed(weight: s.Array) -> s.Array:
    """Returns int16 `[blocks, rows, pairs, VECTORS, LANES, 2]`, filled up with zeros."""
    outputs, channels, height, width = weight.shape
    rows = weight.transpose(0, 2, 3, 1).reshape(outputs, height, width * channels)
    rows = np.pad(rows, ((0, -outputs % OUTPUTS), (0, 0), (0, width * channels % 2)))
    pairs = rows.reshape(-1, VECTORS, LANES, height, rows.shape[2] // 2, 2)
    return pairs.transpose(0, 3, 4, 1, 2, 5).astype(np.int16)
