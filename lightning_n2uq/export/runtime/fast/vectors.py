"""Vector instructions for compiled loops, which numba itself has no words for."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 8
"""32-bit numbers in a vector: what AVX2 holds."""
INT8, INT16, INT32, INT64, FLOAT = *(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType()
_FIRST = ir.Constant(ir.VectorType(INT32, LANES), [0] * LANES)

Value = Any
"""A value of llvmlite, or its builder: there are no types."""


def number(value: int) -> Value:
    """Returns a constant of 64 bits."""
    return ir.Constant(INT64, value)


def load(builder: Value, address: Value, kind: Value) -> Value:
    """Loads from an address, an integer, wherever it lies."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def store(builder: Value, value: Value, address: Value) -> None:
    """Stores at an address, an integer, wherever it lies."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def in_all_lanes(builder: Value, value: Value) -> Value:
    """Returns a vector that repeats a number of 32 bits."""
    nothing = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    one = builder.insert_element(nothing, value, ir.Constant(INT32, 0))
    return builder.shuffle_vector(one, nothing, _FIRST)


def variables(builder: Value, start: Value, count: int) -> list[Value]:
    """Returns places for values that change, all of which begin as `start`; they become registers."""
    return [cgutils.alloca_once_value(builder, start) for _ in range(count)]  # type: ignore[no-untyped-call]


def loop(builder: Value, count: Value) -> Value:
    """Returns a context whose value has the `index` of a loop."""
    return cgutils.for_range(builder, count)
