"""A tile of a convolution of integers: a few pixels by a few vectors of output channels."""

from __future__ import annotations

from llvmlite import ir

from lightning_n2uq.export.runtime.fast.vectors import (
    FLOAT,
    INT64,
    LANES,
    Value,
    load,
    number,
    store,
)

PIXELS, VECTORS = 6, 2
"""Size of a tile: pixels, vectors of output channels."""
OUTPUTS = VECTORS * LANES

_VALUES = ir.VectorType(FLOAT, LANES)


def window_starts(builder: Value, codes: Value, offsets: Value) -> list[Value]:
    """Returns the addresses at which the pixels' windows begin; `offsets` is where theirs are listed."""
    places = (load(builder, builder.add(offsets, number(8 * pixel)), INT64) for pixel in range(PIXELS))
    return [builder.add(codes, place) for place in places]


def write_sums(builder: Value, sums: list[Value], output: Value, output_bytes: Value) -> None:
    """Writes the sums of a tile as float32; `output_bytes` are between two pixels."""
    for pixel in range(PIXELS):
        for vector in range(VECTORS):
            value = builder.sitofp(builder.load(sums[VECTORS * pixel + vector]), _VALUES)
            store(builder, value, builder.add(output, number(4 * LANES * vector)))
        output = builder.add(output, output_bytes)
