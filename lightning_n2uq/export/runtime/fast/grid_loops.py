"""Compiled operations of grids: integers of 8 bits, held as float32 while a block is in the cache."""

from __future__ import annotations

import numpy as np

from lightning_n2uq.ops.backends.common.jit import Array, Number, helper


@helper
def line(x: Array, numbers: Array, period: int, y: Array) -> None:
    """`min(max(rint(x * slope + start), low), high)`; `numbers` has the four in a row. NaN becomes low."""
    slope, start = numbers[:period], numbers[period : 2 * period]
    low, high = numbers[2 * period : 3 * period], numbers[3 * period :]
    for i in range(x.size):
        v = np.rint(x[i] * slope[i] + start[i])
        v = v if v > low[i] else low[i]
        y[i] = v if v < high[i] else high[i]


@helper
def double_line(x: Array, numbers: Array, period: int, y: Array) -> None:
    """As `line`, in float64."""
    slope, start = numbers[:period], numbers[period : 2 * period]
    low, high = numbers[2 * period : 3 * period], numbers[3 * period :]
    for i in range(x.size):
        v = np.rint(np.float64(x[i]) * slope[i] + start[i])
        v = v if v > low[i] else low[i]
        y[i] = np.float32(v if v < high[i] else high[i])


@helper
def look_up(x: Array, table: Array, first: Number, number: int, channels: int, y: Array) -> None:
    """Values of integers from `first` on, in a table `[channels, number]`."""
    for start in range(0, x.size, channels):
        for c in range(channels):
            y[start + c] = np.float32(table[c * number + np.int64(x[start + c] - first)])


@helper
def search(x: Array, t: Array, low: Number, number: int, channels: int, y: Array) -> None:
    """`low` and the number of thresholds passed, in `t` `[channels, number]`, a power of two less one."""
    for start in range(0, x.size, channels):
        for c in range(channels):
            v, base, code, width = x[start + c], c * number, 0, (number + 1) // 2
            while width > 0:
                code += width if v > t[base + code + width - 1] else 0
                width //= 2
            y[start + c] = low + np.float32(code)


@helper
def load_signed(x: Array, y: Array) -> None:
    """Signed bytes as float32."""
    for i in range(x.size):
        y[i] = np.float32(np.int8(x[i]))


@helper
def pack(x: Array, y: Array) -> None:
    """Integers as bytes, negative ones in two's complement."""
    for i in range(x.size):
        y[i] = np.uint8(np.int32(x[i]))
