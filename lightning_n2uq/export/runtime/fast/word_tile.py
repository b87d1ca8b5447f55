"""The inner loop of a convolution of 16-bit integers: products added in pairs in 32 bits."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from lightning_n2uq.export.runtime.fast.tile import OUTPUTS, PIXELS, VECTORS, window_starts, write_sums
from lightning_n2uq.export.runtime.fast.vectors import (
    INT32,
    LANES,
    PAIRS,
    Value,
    add_products,
    load,
    loop,
    number,
    pair_in_all_lanes,
    variables,
)

_SUMS = ir.VectorType(INT32, LANES)


def _generate(context: Value, builder: Value, _: Value, values: Value) -> Value:
    offsets, codes, weights, output, rows, pairs, row_bytes, output_bytes = values
    sums = variables(builder, ir.Constant(_SUMS, None), PIXELS * VECTORS)
    (weight,) = variables(builder, weights, 1)
    places = window_starts(builder, codes, offsets)
    with loop(builder, rows) as row:
        start = builder.mul(row.index, row_bytes)
        starts = [builder.add(place, start) for place in places]
        with loop(builder, pairs) as pair:
            offset, address = builder.mul(pair.index, number(4)), builder.load(weight)
            factors = [
                load(builder, builder.add(address, number(4 * LANES * v)), PAIRS) for v in range(VECTORS)
            ]
            builder.store(builder.add(address, number(4 * OUTPUTS)), weight)
            for pixel, place in enumerate(starts):
                x = pair_in_all_lanes(builder, builder.add(place, offset))
                for target, factor in zip(sums[VECTORS * pixel :][:VECTORS], factors, strict=True):
                    add_products(builder, target, x, factor)
    write_sums(builder, sums, output, output_bytes)
    return context.get_dummy_value()


def _word_tile(
    _: Any,  # noqa: ANN401 -- numba's own types
    offsets: Any,  # noqa: ANN401
    codes: Any,  # noqa: ANN401
    weights: Any,  # noqa: ANN401
    output: Any,  # noqa: ANN401
    rows: Any,  # noqa: ANN401
    pairs: Any,  # noqa: ANN401
    row_bytes: Any,  # noqa: ANN401
    output_bytes: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Writes the sums of `OUTPUTS` channels for `PIXELS` pixels, float32.

    Arguments: address of the offsets at which the pixels' windows begin; addresses of the codes, of the
    weights `[rows, pairs, VECTORS, LANES, 2]` and of the output; rows of the kernel, pairs of numbers in one
    of them; bytes between rows of the codes, and between pixels of the output.
    """
    return types.void(*[types.int64] * 8), _generate


word_tile: Any = intrinsic(_word_tile)
