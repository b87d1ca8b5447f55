"""The inner loop of a split convolution: products of 16-bit integers, added in pairs in 32 bits.

LLVM has no name for "multiply pairs and add" that all processors share, but it knows the pattern: on x86
with AVX2 the code below becomes `vpmaddwd`, with AVX-512 VNNI `vpdpwssd`. Twelve vectors of sums stay in
registers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

PIXELS, LANES = 4, 8
"""Size of a tile: neighbouring pixels, output channels."""

_INT16, _INT32, _INT64, _FLOAT = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_SUMS, _PAIRS = ir.VectorType(_INT32, LANES), ir.VectorType(_INT16, 2 * LANES)
_PRODUCTS, _VALUES = ir.VectorType(_INT32, 2 * LANES), ir.VectorType(_FLOAT, LANES)
_EVEN, _ODD = (ir.Constant(_SUMS, list(range(first, 2 * LANES, 2))) for first in (0, 1))
_FIRST = ir.Constant(_SUMS, [0] * LANES)


def _constant(number: int) -> Any:  # noqa: ANN401 -- llvmlite has no types
    return ir.Constant(_INT64, number)


def _load(builder: Any, address: Any, kind: Any) -> Any:  # noqa: ANN401
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _store(builder: Any, value: Any, address: Any) -> None:  # noqa: ANN401
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _in_all_lanes(builder: Any, value: Any) -> Any:  # noqa: ANN401
    kind = ir.VectorType(value.type, LANES)
    nothing = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(nothing, value, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(one, nothing, _FIRST)


def _pair(builder: Any, address: Any) -> Any:  # noqa: ANN401
    """Returns two neighbouring numbers, in all lanes."""
    return builder.bitcast(_in_all_lanes(builder, _load(builder, address, _INT32)), _PAIRS)


def _add_products(builder: Any, place: Any, x: Any, y: Any) -> None:  # noqa: ANN401
    products = builder.mul(builder.sext(x, _PRODUCTS), builder.sext(y, _PRODUCTS))
    nothing = ir.Constant(_PRODUCTS, ir.Undefined)
    halves = [builder.shuffle_vector(products, nothing, which) for which in (_EVEN, _ODD)]
    builder.store(builder.add(builder.load(place), builder.add(*halves)), place)


def _sum_window(builder: Any, sums: Any, arguments: Any) -> None:  # noqa: ANN401
    """Adds up all products; `sums` are three places per pixel."""
    high, low, weights, rows, pairs, row_bytes, pixel_bytes = arguments
    weight = cgutils.alloca_once_value(builder, weights)  # type: ignore[no-untyped-call]
    with cgutils.for_range(builder, rows) as row:
        start = builder.mul(row.index, row_bytes)
        with cgutils.for_range(builder, pairs) as pair:
            place = builder.add(start, builder.mul(pair.index, _constant(4)))
            address = builder.load(weight)
            weight_high = _load(builder, address, _PAIRS)
            weight_low = _load(builder, builder.add(address, _constant(4 * LANES)), _PAIRS)
            builder.store(builder.add(address, _constant(8 * LANES)), weight)
            for pixel in range(PIXELS):
                x_high, x_low = (_pair(builder, builder.add(part, place)) for part in (high, low))
                factors = (x_high, weight_high), (x_high, weight_low), (x_low, weight_high)
                for target, (x, y) in zip(sums[3 * pixel : 3 * pixel + 3], factors, strict=True):
                    _add_products(builder, target, x, y)
                place = builder.add(place, pixel_bytes)


def _result(builder: Any, sums: Any, numbers: Any) -> Any:  # noqa: ANN401
    """Returns `main * scale + (high_low * scale + low_high * scale)`, every operation rounded."""
    scale, weight_unit, input_unit = (_in_all_lanes(builder, number) for number in numbers)
    main, high_low, low_high = (builder.sitofp(builder.load(place), _VALUES) for place in sums)
    high_low, low_high = builder.fmul(high_low, weight_unit), builder.fmul(low_high, input_unit)
    main, high_low, low_high = (builder.fmul(part, scale) for part in (main, high_low, low_high))
    return builder.fadd(main, builder.fadd(high_low, low_high))


def _generate(context: Any, builder: Any, _: Any, values: Any) -> Any:  # noqa: ANN401
    high, low, weights, output, rows, pairs, row_bytes, pixel_bytes, output_bytes, *numbers = values
    zeros = ir.Constant(_SUMS, None)
    sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(3 * PIXELS)]  # type: ignore[no-untyped-call]
    _sum_window(builder, sums, (high, low, weights, rows, pairs, row_bytes, pixel_bytes))
    for pixel in range(PIXELS):
        result = _result(builder, sums[3 * pixel : 3 * pixel + 3], numbers)
        _store(builder, result, output)
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
