"""The inner loop of a split convolution: products of 16-bit integers, added in pairs in 32 bits.

Twelve vectors of sums stay in registers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from lightning_n2uq.export.runtime.fast.vectors import (
    FLOAT,
    INT32,
    LANES,
    PAIRS,
    Value,
    add_products,
    in_all_lanes,
    load,
    loop,
    number,
    pair_in_all_lanes,
    store,
    variables,
)

PIXELS = 4
"""Neighbouring pixels of a tile, whose other side are `LANES` output channels."""

_SUMS, _VALUES = ir.VectorType(INT32, LANES), ir.VectorType(FLOAT, LANES)


def _sum_window(builder: Value, sums: Value, arguments: Value) -> None:
    """Adds up all products; `sums` are three places per pixel."""
    high, low, weights, rows, pairs, row_bytes, pixel_bytes = arguments
    (weight,) = variables(builder, weights, 1)
    with loop(builder, rows) as row:
        start = builder.mul(row.index, row_bytes)
        with loop(builder, pairs) as pair:
            place = builder.add(start, builder.mul(pair.index, number(4)))
            address = builder.load(weight)
            weight_high = load(builder, address, PAIRS)
            weight_low = load(builder, builder.add(address, number(4 * LANES)), PAIRS)
            builder.store(builder.add(address, number(8 * LANES)), weight)
            for pixel in range(PIXELS):
                x_high, x_low = (pair_in_all_lanes(builder, builder.add(part, place)) for part in (high, low))
                factors = (x_high, weight_high), (x_high, weight_low), (x_low, weight_high)
                for target, (x, y) in zip(sums[3 * pixel : 3 * pixel + 3], factors, strict=True):
                    add_products(builder, target, x, y)
                place = builder.add(place, pixel_bytes)


def _result(builder: Value, sums: Value, numbers: Value) -> Value:
    """Returns `main * scale + (high_low * scale + low_high * scale)`, every operation rounded."""
    scale, weight_unit, input_unit = (in_all_lanes(builder, value) for value in numbers)
    main, high_low, low_high = (builder.sitofp(builder.load(place), _VALUES) for place in sums)
    high_low, low_high = builder.fmul(high_low, weight_unit), builder.fmul(low_high, input_unit)
    main, high_low, low_high = (builder.fmul(part, scale) for part in (main, high_low, low_high))
    return builder.fadd(main, builder.fadd(high_low, low_high))


def _generate(context: Value, builder: Value, _: Value, values: Value) -> Value:
    high, low, weights, output, rows, pairs, row_bytes, pixel_bytes, output_bytes, *numbers = values
    sums = variables(builder, ir.Constant(_SUMS, None), 3 * PIXELS)
    _sum_window(builder, sums, (high, low, weights, rows, pairs, row_bytes, pixel_bytes))
    for pixel in range(PIXELS):
        result = _result(builder, sums[3 * pixel : 3 * pixel + 3], numbers)
        store(builder, result, output)
        output = builder.add(output, output_bytes)
    return context.get_dummy_value()


def _split_tile(
    _: Any,  # noqa: ANN401 -- numba's own types
    high: Any,  # noqa: ANN401
    low: Any,  # noqa: ANN401
    weights: Any,  # noqa: ANN401
    output: Any,  # noqa: ANN401
    rows: Any,  # noqa: ANN401
    pairs: Any,  # noqa: ANN401
    row_bytes: Any,  # noqa: ANN401
    pixel_bytes: Any,  # noqa: ANN401
    output_bytes: Any,  # noqa: ANN401
    scale: Any,  # noqa: ANN401
    weight_unit: Any,  # noqa: ANN401
    input_unit: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Writes `LANES` output channels of `PIXELS` neighbouring pixels of a split convolution.

    Arguments: addresses of the window's high and low parts, of the weights `[rows, pairs, 2, LANES, 2]` and
    of the output; rows of the kernel, pairs of numbers in one of them; bytes between rows and between pixels
    of the input, and between pixels of the output; as float32 the sample's scale, and the units of the low
    weights and of the low input.
    """
    return types.void(*[types.int64] * 9, *[types.float32] * 3), _generate


split_tile: Any = intrinsic(_split_tile)
