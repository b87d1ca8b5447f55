"""Compiled loops over codes: packing them into bit planes and back, and several small planes as one block.

Codes of a plane are stored as bit planes: bit `p` of code `j + i * Q` is bit `i` of byte `p * Q + j`, with
`Q = ceil(P / 8)`: neighbouring bytes hold neighbouring codes, so that packing needs no shuffles. One more
byte says whether the plane has a NaN, which no code can say.

A plane smaller than `BLOCK` would leave the vector units idle between calls: several planes of a channel are
then copied side by side and worked on as one block.
"""

from __future__ import annotations

import numpy as np

from lightning_n2uq.ops.backends.common.jit import Array, compiled, helper
from lightning_n2uq.ops.backends.numba.threshold_loops import BLOCK

PACKED_TOGETHER = 128  # larger planes are packed faster one by one


@helper
def per_block(pixels: int, largest: int) -> int:
    """Returns how many planes of up to `largest` pixels are worked on as one block; 1 for larger ones."""
    return BLOCK // pixels if 0 < pixels <= largest else 1


@helper
def gather(x: Array, channel: int, first: int, planes: int, block: Array) -> None:
    """Copies a channel of `planes` images from `first` on into `block`, one plane after the other."""
    pixels = x.shape[2]
    for k in range(planes):
        source, target = x[first + k, channel], block[k * pixels : (k + 1) * pixels]
        for i in range(pixels):
            target[i] = source[i]


@helper
def scatter(block: Array, channel: int, first: int, planes: int, y: Array) -> None:
    """Undoes `gather`."""
    pixels = y.shape[2]
    for k in range(planes):
        source, target = block[k * pixels : (k + 1) * pixels], y[first + k, channel]
        for i in range(pixels):
            target[i] = source[i]


@helper
def narrow(counts: Array, codes: Array) -> None:
    """Writes the codes as one byte each."""
    for i in range(counts.size):
        codes[i] = counts[i]


@helper
def pack(codes: Array, bits: int, packed: Array) -> None:
    """Packs the codes of a plane, `[8 Q]` uint8, into `bits * Q` bytes."""
    row = codes.size // 8
    for bit in range(bits):
        target = packed[bit * row : (bit + 1) * row]
        for j in range(row):
            target[j] = (codes[j] >> bit) & 1
        for i in range(1, 8):
            part = codes[i * row : (i + 1) * row]
            for j in range(row):
                target[j] |= np.uint8(np.uint8((part[j] >> bit) & 1) << i)


@helper
def unpack(packed: Array, bits: int, codes: Array) -> None:
    """Undoes `pack`."""
    row = codes.size // 8
    for i in range(8):
        target = codes[i * row : (i + 1) * row]
        for j in range(row):
            target[j] = 0
        for bit in range(bits):
            part = packed[bit * row : (bit + 1) * row]
            for j in range(row):
                target[j] |= np.uint8(np.uint8((part[j] >> i) & 1) << bit)


@helper
def pack_planes(counts: Array, pixels: int, planes: int, bits: int, codes: Array, spare: Array) -> None:
    """Packs a block of whole planes into `spare`, `[bits, planes * Q]`: their bit planes side by side.

    `codes` is room for `8 Q` codes per plane, whose last stay 0.
    """
    row = (pixels + 7) // 8
    for i in range(8):
        for k in range(planes):
            for j in range(min(row, pixels - i * row)):
                codes[(i * planes + k) * row + j] = counts[k * pixels + i * row + j]
    pack(codes, bits, spare)


@helper
def look_up(codes: Array, values: Array, y: Array) -> None:
    """Writes `y` by its codes, of which there may be more; where values are few, by comparing."""
    if values.size == 4:
        v0, v1, v2, v3 = values[0], values[1], values[2], values[3]
        for i in range(y.size):
            code = codes[i]
            low = v1 if code == 1 else v0
            high = v3 if code == 3 else v2
            y[i] = high if code >= 2 else low
    else:
        for i in range(y.size):
            y[i] = values[codes[i]]


@compiled
def rebuild_channels(first: int, last: int, packed: Array, values: Array, bits: int, y: Array) -> None:
    """Writes `y` of the channels `first .. last - 1` from the packed codes: the bits that forward gave."""
    batch, pixels = y.shape[0], y.shape[2]
    row, flag = (pixels + 7) // 8, packed.shape[2] - 1
    together = min(per_block(pixels, PACKED_TOGETHER), batch)
    codes = np.empty(8 * row * together, np.uint8)
    spare = np.empty(bits * row * together, np.uint8)
    for c in range(first, last):
        for n in range(0, batch, together):
            planes = min(together, batch - n)
            part = codes[: 8 * row * planes]
            if planes == 1:
                unpack(packed[n, c], bits, part)
            else:
                for k in range(planes):
                    for bit in range(bits):
                        for j in range(row):
                            spare[(bit * planes + k) * row + j] = packed[n + k, c, bit * row + j]
                unpack(spare, bits, part)
            if planes == 1:
                look_up(part, values, y[n, c])
            else:
                for i in range(8):
                    for k in range(planes):
                        for j in range(min(row, pixels - i * row)):
                            y[n + k, c, i * row + j] = values[part[(i * planes + k) * row + j]]
            for k in range(planes):
                if packed[n + k, c, flag]:
                    y[n + k, c, :] = np.nan
