# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202
"""Eight lanes at a time, written in LLVM's own vector types where its vectoriser finds no good code.

LLVM lowers these to whatever the processor has: one AVX register, two of NEON or SSE. Arithmetic is IEEE,
operation by operation, as in the reference.
"""

import functools

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

LANES = 8

_INT = ir.IntType(32)
_INTS = ir.VectorType(_INT, LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)


def _constant(values):
    return ir.Constant(_INTS, list(values))


def _splat(builder, value, vector):
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), _constant([0] * LANES))


def _pointer(context, builder, array_type, array, index, target):
    """Returns a pointer to element `index` of an array, as one to `target`."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), target.as_pointer())


def _load(builder, pointer, align=4):
    value = builder.load(pointer)
    value.align = align
    return value


def _store(builder, value, pointer):
    builder.store(value, pointer).align = 4


def _within(builder, vector, step):
    """Returns sums and differences of lanes `step` apart: `a + b` in the lower, `a - b` in the upper."""
    swapped = builder.shuffle_vector(vector, vector, _constant([lane ^ step for lane in range(LANES)]))
    flips = _constant([-(1 << 31) if lane & step else 0 for lane in range(LANES)])
    flipped = builder.bitcast(builder.xor(builder.bitcast(vector, _INTS), flips), _FLOATS)
    return builder.fadd(swapped, flipped)


def _across(builder, vectors, step):
    """Replaces vectors `step` apart by their sum and their difference."""
    for index in range(len(vectors)):
        if not index & step:
            low, high = vectors[index], vectors[index | step]
            vectors[index], vectors[index | step] = builder.fadd(low, high), builder.fsub(low, high)


@functools.cache
def butterflies(count, within):
    """Returns a compiled call `f(x, start, stride)`: a Walsh-Hadamard transform over `count` vectors.

    The vectors of eight are `stride` coordinates apart, from `x[start]` on, and are overwritten.

    Args:
        count: A power of two.
        within: Whether to transform inside of the vectors first, over the lowest three bits of the index.
    """

    @intrinsic
    def transform(typingctx, x, start, stride):
        def generate(context, builder, signature, args):
            array, begin, step = args
            places = [
                _pointer(
                    context, builder, signature.args[0], array,
                    builder.add(begin, builder.mul(step, ir.Constant(step.type, index))), _FLOATS,
                )
                for index in range(count)
            ]  # fmt: skip
            vectors = [_load(builder, place) for place in places]
            for distance in (1, 2, 4) if within else ():
                vectors = [_within(builder, vector, distance) for vector in vectors]
            distance = 1
            while distance < count:
                _across(builder, vectors, distance)
                distance *= 2
            for vector, place in zip(vectors, places, strict=True):
                _store(builder, vector, place)
            return context.get_dummy_value()

        return types.void(x, types.int64, types.int64), generate

    return transform


def _codes(context, builder, array_type, packed, place, bits):
    """Returns the codes of eight coordinates, int32, from `bits` bytes at `packed[place]`."""
    word = ir.Constant(_INT, 0)
    if bits == 3:
        for index in range(3):
            at = builder.add(place, ir.Constant(place.type, index))
            byte = _load(builder, _pointer(context, builder, array_type, packed, at, ir.IntType(8)), 1)
            word = builder.or_(word, builder.shl(builder.zext(byte, _INT), ir.Constant(_INT, 8 * index)))
    else:
        number = _load(
            builder, _pointer(context, builder, array_type, packed, place, ir.IntType(8 * bits)), 1
        )
        word = number if bits == 4 else builder.zext(number, _INT)
    shifted = builder.lshr(_splat(builder, word, _INTS), _constant([bits * lane for lane in range(LANES)]))
    return builder.and_(shifted, _constant([(1 << bits) - 1] * LANES))


def _bit(builder, codes, bit):
    return builder.icmp_signed(
        "!=", builder.and_(codes, _constant([1 << bit] * LANES)), _constant([0] * LANES)
    )


@functools.cache
def levels_of_codes(add):
    """Returns a compiled call `f(packed, place, levels, x, start)`: writes eight coordinates to `x[start]`.

    `levels` are a bucket's positive levels, times its scale, as a tuple: their number decides about the bits.

    Args:
        add: Whether to add to what is there.
    """

    @intrinsic
    def write(typingctx, packed, place, levels, x, start):
        count = len(levels)

        def generate(context, builder, signature, args):
            array, begin, scaled, target, first = args
            codes = _codes(context, builder, signature.args[0], array, begin, count.bit_length())
            magnitudes = [builder.extract_value(scaled, index) for index in range(count)]
            value = _signed(builder, codes, [_splat(builder, one, _FLOATS) for one in magnitudes])
            pointer = _pointer(context, builder, signature.args[3], target, first, _FLOATS)
            _store(builder, builder.fadd(_load(builder, pointer), value) if add else value, pointer)
            return context.get_dummy_value()

        return types.void(packed, types.int64, levels, x, types.int64), generate

    return write


def _signed(builder, codes, levels):
    """Returns what codes stand for: one of the levels, negative where the highest bit is set."""
    bits = len(levels).bit_length()
    for bit in range(bits - 1):
        chosen = _bit(builder, codes, bit)
        levels = [
            builder.select(chosen, high, low) for low, high in zip(levels[::2], levels[1::2], strict=True)
        ]
    sign = builder.shl(builder.lshr(codes, _constant([bits - 1] * LANES)), _constant([31] * LANES))
    return builder.bitcast(builder.xor(builder.bitcast(levels[0], _INTS), sign), _FLOATS)
