"""Compiled loops of a convolution of bytes: the padded codes, and tiles of the output."""

from __future__ import annotations

import numpy as np

from lightning_n2uq.export.runtime.fast.byte_tile import byte_tile
from lightning_n2uq.export.runtime.fast.tile import OUTPUTS, PIXELS
from lightning_n2uq.ops.backends.common.jit import Array, compiled


@compiled
def pad_rows(first: int, last: int, x: Array, top: int, left: int, padded: Array) -> None:
    """Writes rows `first .. last - 1`, through all samples, of codes `[N, H, W C]` with zeros around."""
    rows, height, width = padded.shape[1], x.shape[1], x.shape[2]
    for chunk in range(first, last):
        sample, i = chunk // rows, chunk % rows
        target = padded[sample, i]
        if top <= i < top + height:
            target[:left] = 0
            target[left : left + width] = x[sample, i - top]
            target[left + width :] = 0
        else:
            target[:] = 0


@compiled
def convolve_tiles(
    first: int, last: int, addresses: Array, offsets: Array, sizes: Array, steps: Array, groups: int, y: Array
) -> None:
    """Writes groups `first .. last - 1` of tiles, counted through blocks of output channels and samples.

    Args:
        first: The first group.
        last: The group behind the last one.
        addresses: Of the codes, of the weights, of the output.
        offsets: Where the window of each pixel of a sample begins, filled up to whole tiles.
        sizes: Rows of the kernel, segments of a row, steps of a segment, bytes of a block's weights.
        steps: Bytes from one sample of the codes to the next, from one row to the next.
        groups: Into how many groups a sample's tiles are divided.
        y: The output, `[N, H' W', O]` float32.
    """
    pixels, channels = y.shape[1], y.shape[2]
    blocks, tiles = (channels + OUTPUTS - 1) // OUTPUTS, offsets.size // PIXELS
    edge = np.empty((PIXELS, OUTPUTS), np.float32)
    for chunk in range(first, last):
        group, rest = chunk % groups, chunk // groups
        channel, sample = rest % blocks * OUTPUTS, rest // blocks
        codes, weights = addresses[0] + sample * steps[0], addresses[1] + rest % blocks * sizes[3]
        for tile in range(tiles * group // groups, tiles * (group + 1) // groups):
            pixel = tile * PIXELS
            whole = pixel + PIXELS <= pixels and channel + OUTPUTS <= channels
            place = addresses[2] + 4 * ((sample * pixels + pixel) * channels + channel)
            byte_tile(
                offsets[pixel:].ctypes.data, codes, weights, place if whole else edge.ctypes.data,
                sizes[0], sizes[1], sizes[2], steps[1], 4 * channels if whole else 4 * OUTPUTS,
            )  # fmt: skip
            if not whole:
                for p in range(min(PIXELS, pixels - pixel)):
                    for c in range(min(OUTPUTS, channels - channel)):
                        y[sample, pixel + p, channel + c] = edge[p, c]
