"""The inner loop of a convolution of bytes on x86 without VNNI: pairs of products, added up in 16 bits.

General kernels widen every pair of products to 32 bits at once, as weights of 8 bits demand. Codes and levels
of a few bits leave room for many of them: sums stay in 16 bits for a whole segment of a kernel's row, and
so each multiplication (`vpmaddubsw`, 32 products) needs but one addition.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from lightning_n2uq.export.runtime.fast.tile import OUTPUTS, PIXELS, VECTORS, window_starts, write_sums
from lightning_n2uq.export.runtime.fast.vectors import (
    INT8,
    INT16,
    INT32,
    LANES,
    Value,
    in_all_lanes,
    load,
    loop,
    number,
    variables,
)

STEP = 4
"""Neighbouring bytes of the input that are read at once."""

_BYTES, _SUMS = ir.VectorType(INT8, 4 * LANES), ir.VectorType(INT16, 2 * LANES)
_TOTALS = ir.VectorType(INT32, LANES)
_ONES = ir.Constant(_SUMS, [1] * (2 * LANES))


def _instruction(builder: Value, name: str, result: Value, operand: Value) -> Value:
    return builder.module.declare_intrinsic(name, (), ir.FunctionType(result, [operand, operand]))


def _add_segment(builder: Value, sums: list[Value], places: list[Value], weight: Value, steps: Value) -> None:
    """Adds up the products of one segment in 16 bits."""
    multiply = _instruction(builder, "llvm.x86.avx2.pmadd.ub.sw", _SUMS, _BYTES)
    for place in sums:
        builder.store(ir.Constant(_SUMS, None), place)
    with loop(builder, steps) as step:
        offset, address = builder.mul(step.index, number(STEP)), builder.load(weight)
        weights = [load(builder, builder.add(address, number(4 * LANES * v)), _BYTES) for v in range(VECTORS)]
        builder.store(builder.add(address, number(4 * OUTPUTS)), weight)
        for pixel, place in enumerate(places):
            four = load(builder, builder.add(place, offset), INT32)
            codes = builder.bitcast(in_all_lanes(builder, four), _BYTES)
            for target, factor in zip(sums[VECTORS * pixel :][:VECTORS], weights, strict=True):
                products = builder.call(multiply, [codes, factor])
                builder.store(builder.add(builder.load(target), products), target)


def _widen(builder: Value, sums: list[Value], totals: list[Value]) -> None:
    """Adds neighbouring sums of 16 bits to totals of 32."""
    add_pairs = _instruction(builder, "llvm.x86.avx2.pmadd.wd", _TOTALS, _SUMS)
    for place, total in zip(sums, totals, strict=True):
        pairs = builder.call(add_pairs, [builder.load(place), _ONES])
        builder.store(builder.add(builder.load(total), pairs), total)


def _generate(context: Value, builder: Value, _: Value, values: Value) -> Value:
    offsets, codes, weights, output, rows, segments, steps, row_bytes, output_bytes = values
    totals = variables(builder, ir.Constant(_TOTALS, None), PIXELS * VECTORS)
    sums = variables(builder, ir.Constant(_SUMS, None), PIXELS * VECTORS)
    (weight,) = variables(builder, weights, 1)
    pixels = window_starts(builder, codes, offsets)
    with loop(builder, rows) as row, loop(builder, segments) as segment:
        inside = builder.mul(segment.index, builder.mul(steps, number(STEP)))
        start = builder.add(builder.mul(row.index, row_bytes), inside)
        places = [builder.add(pixel, start) for pixel in pixels]
        _add_segment(builder, sums, places, weight, steps)
        _widen(builder, sums, totals)
    write_sums(builder, totals, output, output_bytes)
    return context.get_dummy_value()


def _byte_tile(
    _: Any,  # noqa: ANN401 -- numba's own types
    offsets: Any,  # noqa: ANN401
    codes: Any,  # noqa: ANN401
    weights: Any,  # noqa: ANN401
    output: Any,  # noqa: ANN401
    rows: Any,  # noqa: ANN401
    segments: Any,  # noqa: ANN401
    steps: Any,  # noqa: ANN401
    row_bytes: Any,  # noqa: ANN401
    output_bytes: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Writes the sums of `OUTPUTS` channels for `PIXELS` pixels, float32.

    Arguments: address of the offsets at which the pixels' windows begin; addresses of the codes, of the
    weights `[rows, segments, steps, VECTORS, LANES, STEP]` and of the output; rows of the kernel, segments of
    a row, steps of a segment; bytes between rows of the codes, and between pixels of the output.
    """
    return types.void(*[types.int64] * 9), _generate


byte_tile: Any = intrinsic(_byte_tile)
