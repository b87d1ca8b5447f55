"""Vector instructions for compiled loops, which numba itself has no words for."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 8
"""32-bit numbers in a vector: what AVX2 holds."""
INT8, INT16, INT32, INT64, FLOAT = *(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType()
PAIRS = ir.VectorType(INT16, 2 * LANES)
_PRODUCTS, _SUMS = ir.VectorType(INT32, 2 * LANES), ir.VectorType(INT32, LANES)
_EVEN, _ODD = (ir.Constant(_SUMS, list(range(first, 2 * LANES, 2))) for first in (0, 1))
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


def pair_in_all_lanes(builder: Value, address: Value) -> Value:
    """Returns two neighbouring numbers of 16 bits, repeated."""
    return builder.bitcast(in_all_lanes(builder, load(builder, address, INT32)), PAIRS)


def add_products(builder: Value, place: Value, x: Value, y: Value) -> None:
    """Adds neighbouring products of 16-bit numbers to sums of 32 bits.

    LLVM has no name for that which all processors share, but it knows the pattern: with AVX2 it becomes
    `vpmaddwd`, with AVX-512 VNNI `vpdpwssd`.
    """
    products = builder.mul(builder.sext(x, _PRODUCTS), builder.sext(y, _PRODUCTS))
    nothing = ir.Constant(_PRODUCTS, ir.Undefined)
    halves = [builder.shuffle_vector(products, nothing, which) for which in (_EVEN, _ODD)]
    builder.store(builder.add(builder.load(place), builder.add(*halves)), place)


def variables(builder: Value, start: Value, count: int) -> list[Value]:
    """Returns places for values that change, all of which begin as `start`; they become registers."""
    return [cgutils.alloca_once_value(builder, start) for _ in range(count)]  # type: ignore[no-untyped-call]


def loop(builder: Value, count: Value) -> Value:
    """Returns a context whose value has the `index` of a loop."""
    return cgutils.for_range(builder, count)
