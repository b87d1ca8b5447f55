"""Compiled loops of the fast engine: a program of elementwise operations, run block by block.

A map is a flat array in channels-last order. A block of it goes through all operations of a program while it
lies in the processor's cache. A row of a program is `(operation, target, left, right, offset, count)`: the
operands are registers (blocks of scratch memory) below `REGISTERS`, maps from there on; `offset` says where
in `params` the per-channel numbers begin, repeated along a `period` of whole pixels. Every operation is one
IEEE float32 operation or a fixed sequence of them, so that results have the bits of the other engines.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray  # type: ignore[attr-defined]
from numba.core import types
from numba.extending import intrinsic

from lightning_n2uq.export.runtime.fast import grid_loops
from lightning_n2uq.ops.backends.common.jit import Array, Number, compiled, helper

(COPY, AFFINE, SCALE, SHIFT, DIVIDE, PRELU, CLAMP, ADD, MUL, LOAD, CODES, SEARCH, UNIFORM, SPLIT) = range(14)
LOAD_SIGNED, PACK, GRID, GRID_DOUBLE, GRID_TABLE, GRID_SEARCH = range(14, 20)
REGISTERS = 6


def _address_type(_: Any, address: Any) -> Any:  # noqa: ANN401 -- numba's own types
    """Returns an address, an integer, as a pointer."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:  # noqa: ANN401
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), generate


_pointer: Any = intrinsic(_address_type)


@helper
def _floats(address: int, start: int, size: int) -> Array:
    return carray(_pointer(address + 4 * start), (size,), np.float32)


@helper
def _bytes(address: int, start: int, size: int) -> Array:
    return carray(_pointer(address + start), (size,), np.uint8)


@helper
def _affine(x: Array, scale: Array, shift: Array, y: Array) -> None:
    for i in range(x.size):
        y[i] = x[i] * scale[i] + shift[i]


@helper
def _scale(x: Array, scale: Array, y: Array) -> None:
    for i in range(x.size):
        y[i] = x[i] * scale[i]


@helper
def _shift(x: Array, shift: Array, y: Array) -> None:
    for i in range(x.size):
        y[i] = x[i] + shift[i]


@helper
def _divide(x: Array, divisor: Array, y: Array) -> None:
    for i in range(x.size):
        y[i] = x[i] / divisor[i]


@helper
def _prelu(x: Array, slope: Array, y: Array) -> None:
    for i in range(x.size):
        below = x[i] * slope[i]
        y[i] = x[i] if x[i] > 0 else below


@helper
def _clamp(x: Array, low: Number, high: Number, y: Array) -> None:
    for i in range(x.size):
        v = low if x[i] < low else x[i]
        y[i] = high if v > high else v


@helper
def _add(x: Array, other: Array, y: Array) -> None:
    for i in range(x.size):
        y[i] = x[i] + other[i]


@helper
def _mul(x: Array, other: Array, y: Array) -> None:
    for i in range(x.size):
        y[i] = x[i] * other[i]


@helper
def _load(x: Array, y: Array) -> None:
    for i in range(x.size):
        y[i] = np.float32(x[i])


@helper
def _split(pair: Array, low: Array, scale: Number, channels: int, y: Array) -> None:
    """`main * scale + (high_low * scale + low_high * scale)`; `pair` has both of the first two per pixel."""
    for start in range(0, y.size, channels):
        main, high_low = pair[2 * start : 2 * start + channels], pair[2 * start + channels :]
        low_high, target = low[start:], y[start:]
        for c in range(channels):
            target[c] = main[c] * scale + (high_low[c] * scale + low_high[c] * scale)


@helper
def _count3(x: Array, t: Array, period: int, y: Array) -> None:
    a, b, c = t[:period], t[period : 2 * period], t[2 * period : 3 * period]
    for i in range(x.size):
        y[i] = np.uint8(np.int32(x[i] > a[i]) + np.int32(x[i] > b[i]) + np.int32(x[i] > c[i]))


@helper
def _count5(x: Array, t: Array, period: int, counts: Array) -> None:
    a, b, c = t[:period], t[period : 2 * period], t[2 * period : 3 * period]
    d, e = t[3 * period : 4 * period], t[4 * period : 5 * period]
    for i in range(x.size):
        v = x[i]
        counts[i] += (
            np.int32(v > a[i])
            + np.int32(v > b[i])
            + np.int32(v > c[i])
            + np.int32(v > d[i])
            + np.int32(v > e[i])
        )


@helper
def _count(x: Array, t: Array, period: int, number: int, counts: Array, y: Array) -> None:
    """Writes the number of thresholds `[number, period]` below each value: 3, or a multiple of 5."""
    if number == 3:
        _count3(x, t, period, y)
        return
    for i in range(x.size):
        counts[i] = 0
    for k in range(0, number, 5):
        _count5(x, t[k * period :], period, counts)
    for i in range(x.size):
        y[i] = np.uint8(counts[i])


@helper
def _search(x: Array, t: Array, number: int, channels: int, y: Array) -> None:
    """As `_count`, by bisection in `t` `[channels, number]`; `number` is a power of two less one."""
    for start in range(0, x.size, channels):
        for c in range(channels):
            v, base, code, width = x[start + c], c * number, 0, (number + 1) // 2
            while width > 0:
                code += width if v > t[base + code + width - 1] else 0
                width //= 2
            y[start + c] = np.uint8(code)


@helper
def _uniform(x: Array, step: Number, offset: Number, levels: Number, y: Array) -> None:
    zero = np.float32(0)
    for i in range(x.size):
        v = np.rint((x[i] - offset) / step)
        v = v if v > zero else zero  # NaN, too
        v = levels if v > levels else v
        y[i] = np.uint8(np.int32(v))


@helper
def _operate(
    row: Array, params: Array, x: Array, other: Array, y: Array, period: int, counts: Array, out: Array
) -> None:
    """Runs one operation with per-channel numbers on a block, period by period."""
    op, offset, number = row[0], row[4], row[5]
    for start in range(0, x.size, period):
        size = min(period, x.size - start)
        a, b = x[start : start + size], y[start : start + size]
        p = params[offset : offset + size]
        if op == AFFINE:
            _affine(a, p, params[offset + period : offset + period + size], b)
        elif op == SCALE:
            _scale(a, p, b)
        elif op == SHIFT:
            _shift(a, p, b)
        elif op == DIVIDE:
            _divide(a, p, b)
        elif op == PRELU:
            _prelu(a, p, b)
        elif op == GRID:
            grid_loops.line(a, params[offset : offset + 4 * period], period, b)
        elif op == GRID_DOUBLE:
            doubles = params[offset : offset + 8 * period].view(np.float64)
            grid_loops.double_line(a, doubles, period, b)
        elif op == CODES:
            _count(a, params[offset:], period, number, counts, out[start : start + size])


@helper
def run_block(
    program: Array,
    params: Array,
    addresses: Array,
    spans: Array,
    scratch: Array,
    counts: Array,
    scales: Array,
    sample: int,
    start: int,
    size: int,
    channels: int,
    period: int,
) -> None:
    """Runs a program on the values `start .. start + size - 1` of a sample."""
    for index in range(len(program)):
        row = program[index]
        op, target, left, right, offset, number = row[0], row[1], row[2], row[3], row[4], row[5]
        x = y = other = scratch[0, :size]
        out = _bytes(addresses[0], 0, 0)
        place = sample * spans[left] + start
        if op in (LOAD, LOAD_SIGNED):
            out = _bytes(addresses[left], place, size)
        elif op == SPLIT:
            x = _floats(addresses[left], sample * spans[left] + 2 * start, 2 * size)
        else:
            x = scratch[left, :size] if left < REGISTERS else _floats(addresses[left], place, size)
        if right >= 0:
            place = sample * spans[right] + start
            other = scratch[right, :size] if right < REGISTERS else _floats(addresses[right], place, size)
        place = sample * spans[target] + start
        if op in (CODES, SEARCH, UNIFORM, PACK):
            out = _bytes(addresses[target], place, size)
        else:
            y = scratch[target, :size] if target < REGISTERS else _floats(addresses[target], place, size)
        if op == ADD:
            _add(x, other, y)
        elif op == MUL:
            _mul(x, other, y)
        elif op == COPY:
            y[:] = x
        elif op == CLAMP:
            _clamp(x, params[offset], params[offset + 1], y)
        elif op == LOAD:
            _load(out, y)
        elif op == LOAD_SIGNED:
            grid_loops.load_signed(out, y)
        elif op == PACK:
            grid_loops.pack(x, out)
        elif op == GRID_TABLE:
            grid_loops.look_up(x, params[offset + 1 :].view(np.int16), params[offset], number, channels, y)
        elif op == GRID_SEARCH:
            grid_loops.search(x, params[offset + 1 :], params[offset], number, channels, y)
        elif op == SPLIT:
            _split(x, other, scales[sample], channels, y)
        elif op == SEARCH:
            _search(x, params[offset:], number, channels, out)
        elif op == UNIFORM:
            _uniform(x, params[offset], params[offset + 1], params[offset + 2], out)
        else:
            _operate(row, params, x, other, y, period, counts, out)


@compiled
def run_program(
    first: int,
    last: int,
    program: Array,
    params: Array,
    addresses: Array,
    spans: Array,
    scales: Array,
    elements: int,
    length: int,
    channels: int,
    period: int,
) -> None:
    """Runs a program on the blocks `first .. last - 1`, every sample's `elements` being cut into `length`."""
    scratch, counts = np.empty((REGISTERS, length), np.float32), np.empty(period, np.int32)
    blocks = (elements + length - 1) // length
    for chunk in range(first, last):
        sample, start = chunk // blocks, chunk % blocks * length
        size = min(length, elements - start)
        run_block(
            program, params, addresses, spans, scratch, counts, scales, sample, start, size, channels, period
        )
