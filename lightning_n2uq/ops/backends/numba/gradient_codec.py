# Compiled functions take no annotations: numba infers the types of their arguments.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Numba kernels of the gradient codec: one pass over the gradient, nothing stored between the steps.

`encode` replaces `encode_reference`, `decode_mean` replaces `decode_mean_reference`; both give the same bits
as the reference, for any number of threads. The work is split by buckets. Within a bucket (a few KB, in the
first-level cache) short loops follow each other, each of which the compiler vectorises: largest entry, norm,
codes, packing.

Byte order is little-endian, as on every platform that torch supports. Indices are int64 throughout.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, overload
from torch import Tensor

from lightning_n2uq.ops.backends.common.kernel_cache import cached
from lightning_n2uq.ops.backends.common.rng import GOLDEN, M1, M2, message_key
from lightning_n2uq.ops.backends.common.threads import run_ranges
from lightning_n2uq.ops.formats.gradient_codec import NUQFormat

_SMALLEST_RANGE = 65536  # coordinates per thread below which a second thread costs more than it saves
_GOLDEN, _M1, _M2 = np.uint32(GOLDEN), np.uint32(M1), np.uint32(M2)
_NAN_BITS = np.int32(0x7FC00000)
_INF_BITS = np.int32(0x7F800000)
_ABS = np.int32(0x7FFFFFFF)
_GATHER_BITS = np.uint64(0x0102040810204080)  # moves bit 0 of byte `k` to bit `56 + k`


def _bitcast(source, target, width):
    """Returns an intrinsic that reinterprets the bits of a scalar."""

    @intrinsic
    def cast(typingctx, value):
        def generate(context, builder, signature, args):
            return builder.bitcast(args[0], width)

        return target(source), generate

    return cast


bits_of = _bitcast(types.float32, types.int32, ir.IntType(32))
float_of_bits = _bitcast(types.int32, types.float32, ir.FloatType())
double_of_bits = _bitcast(types.int64, types.float64, ir.DoubleType())


@numba.njit
def mix(x, key):
    """Returns `rng._mix` on uint32; the casts keep numba from widening to 64 bits."""
    x = np.uint32(np.uint32(x ^ np.uint32(x >> np.uint32(16))) * _M1)
    x = np.uint32(x ^ key)
    x = np.uint32(np.uint32(x ^ np.uint32(x >> np.uint32(13))) * _M2)
    return np.uint32(x ^ np.uint32(x >> np.uint32(16)))


@numba.njit
def whole_factors(largest):
    """Returns two powers of two, whose product makes 24-bit integers of magnitudes, and what one stands for.

    Scaling by them and truncating gives the reference's shifted mantissas. Their product may exceed fp32's
    range, hence two; an intermediate product that underflows is far below 1 and truncates to 0.

    Args:
        largest: The bit pattern of the largest magnitude.
    """
    exponent = np.int32(150) - max(np.int32(largest >> 23), np.int32(1))
    half = np.int32(exponent >> 1)
    scale1 = float_of_bits(np.int32((half + np.int32(127)) << 23))
    scale2 = float_of_bits(np.int32((np.int32(exponent - half) + np.int32(127)) << 23))
    return scale1, scale2, double_of_bits((np.int64(1023) - np.int64(exponent)) << 52)


@numba.njit
def squares(x, scale1, scale2):
    """Returns the exact sum of squares of `x` as 24-bit integers, uint64."""
    total = np.uint64(0)
    for j in range(x.size):
        scaled = np.uint64(np.uint32(np.int32(np.float32(np.float32(abs(x[j]) * scale1) * scale2))))
        total += scaled * scaled
    return total


@numba.njit
def _l2_norm(x, largest):
    """Returns an exact integer sum of squares of 24-bit magnitudes, its fp64 square root, as fp32."""
    scale1, scale2, unit = whole_factors(largest)
    return np.float32(np.sqrt(np.float64(squares(x, scale1, scale2))) * unit)


@numba.njit
def _norm_bits(x, patterns, l2):
    """Returns the bits of a bucket's norm: NaN's for non-finite entries, infinity's beyond fp32."""
    largest = np.int32(0)
    for j in range(patterns.size):
        largest = max(largest, np.int32(patterns[j] & _ABS))
    if largest >= _INF_BITS:
        return _NAN_BITS
    return bits_of(_l2_norm(x, largest)) if l2 and largest > 0 else largest


def _float_loop(exponential):
    """Returns the `float` family's loop; without mantissa bits its shifts are constants, which is faster."""

    def loop(x, norm, keys, bits, family, codes):
        k0, k1 = keys
        mantissa_bits, lowest, inverse_lowest = family
        if exponential:
            shift, drop = np.int32(23), np.uint32(9)
        else:  # masked to below 32, which lets the compiler shift 32-bit lanes instead of 64-bit ones
            shift = np.int32(np.int32(23 - int(mantissa_bits)) & np.int32(31))
            drop = np.uint32(np.uint32(9 + int(mantissa_bits)) & np.uint32(31))
        offset = np.int32((127 << int(mantissa_bits)) - ((1 << (bits - 1)) - 1))
        sign_bit = np.int32(1 << (bits - 1))
        for j in range(x.size):
            random = mix(np.uint32(k0 + np.uint32(np.uint32(j) * _GOLDEN)), k1)
            ratio = np.float32(abs(x[j]) / norm)
            raised = np.int32(bits_of(ratio) + np.int32(np.uint32(random >> drop)))
            code = np.int32(np.int32(raised >> shift) - offset)
            scaled = np.float32(ratio * inverse_lowest)
            scaled = scaled if scaled < np.float32(0.99999994) else np.float32(0.99999994)
            share = np.int32(np.float32(scaled * np.float32(2147483648.0)))
            up = np.int32(np.int32(random >> np.uint32(1)) < share)
            magnitude = np.int32(up if ratio < lowest else code)
            negative = (bits_of(x[j]) < np.int32(0)) & (magnitude > np.int32(0))
            codes[j] = np.uint8(magnitude | (sign_bit if negative else np.int32(0)))

    return loop


_exponential_codes, _float_codes = _float_loop(True), _float_loop(False)


def _uniform_codes(x, norm, keys, bits, family, codes):
    k0, k1 = keys
    sign_bit = np.int32(1 << (bits - 1))
    for j in range(x.size):
        random = mix(np.uint32(k0 + np.uint32(np.uint32(j) * _GOLDEN)), k1)
        uniform01 = np.float32(np.float32(np.int32(random >> np.uint32(8))) * np.float32(2.0**-24))
        scaled = np.float32(np.float32(abs(x[j]) / norm) * family)
        lower = np.int32(scaled)
        magnitude = np.int32(lower + np.int32(uniform01 < np.float32(scaled - np.float32(lower))))
        negative = (bits_of(x[j]) < np.int32(0)) & (magnitude > np.int32(0))
        codes[j] = np.uint8(magnitude | (sign_bit if negative else np.int32(0)))


def _table_codes(x, norm, keys, bits, family, codes):
    k0, k1 = keys
    levels = family
    sign_bit = np.int32(1 << (bits - 1))
    for j in range(x.size):
        random = mix(np.uint32(k0 + np.uint32(np.uint32(j) * _GOLDEN)), k1)
        uniform01 = np.float32(np.float32(np.int32(random >> np.uint32(8))) * np.float32(2.0**-24))
        ratio = np.float32(abs(x[j]) / norm)
        lower = np.int32(0)
        step = np.int32(sign_bit >> 1)
        while step > 0:  # bisection; the last interval is closed at the top
            trial = np.int32(lower + step)
            if trial < sign_bit - 1 and levels[trial] <= ratio:
                lower = trial
            step = np.int32(step >> 1)
        gap = np.float32(levels[lower + 1] - levels[lower])
        up = uniform01 < np.float32(np.float32(ratio - levels[lower]) / gap)
        magnitude = np.int32(lower + np.int32(up))
        negative = (x[j] < np.float32(0)) & (magnitude > np.int32(0))
        codes[j] = np.uint8(magnitude | (sign_bit if negative else np.int32(0)))


@numba.njit
def pack(codes, packed, bits):
    """Packs `codes` (uint8, zeros behind the last one up to a multiple of 8) into all of `packed`."""
    if bits == 8:
        packed[:] = codes[: packed.size]
    elif bits == 4:
        for j in range(packed.size):
            packed[j] = np.uint8(codes[2 * j] | np.uint8(codes[2 * j + 1] << np.uint8(4)))
    elif bits == 1:
        words = codes.view(np.uint64)
        for g in range(packed.size):
            packed[g] = np.uint8(np.uint64(words[g] * _GATHER_BITS) >> np.uint64(56))
    elif bits == 2:
        for j in range(packed.size):
            low = np.uint8(codes[4 * j] | np.uint8(codes[4 * j + 1] << np.uint8(2)))
            high = np.uint8(codes[4 * j + 2] | np.uint8(codes[4 * j + 3] << np.uint8(2)))
            packed[j] = np.uint8(low | np.uint8(high << np.uint8(4)))
    else:
        whole = packed.size // 3
        words = codes.view(np.uint64)
        for g in range(whole):
            word = _join_3bit(words[g])
            packed[3 * g] = np.uint8(word)
            packed[3 * g + 1] = np.uint8(word >> np.uint64(8))
            packed[3 * g + 2] = np.uint8(word >> np.uint64(16))
        for k in range(packed.size - 3 * whole):
            packed[3 * whole + k] = np.uint8(_join_3bit(words[whole]) >> np.uint64(8 * k))


@numba.njit
def _join_3bit(word):
    """Joins eight bytes of 3 bits each (a 64-bit word) to 24 bits: halves the gaps three times."""
    word = (word & np.uint64(0x0007000700070007)) | ((word >> np.uint64(5)) & np.uint64(0x0038003800380038))
    word = (word & np.uint64(0x0000003F0000003F)) | ((word >> np.uint64(10)) & np.uint64(0x00000FC000000FC0))
    return (word & np.uint64(0xFFF)) | ((word >> np.uint64(20)) & np.uint64(0xFFF000))


@numba.njit
def _split_3bit(word):
    """Splits what `_join_3bit` has joined."""
    word = (word & np.uint64(0xFFF)) | ((word & np.uint64(0xFFF000)) << np.uint64(20))
    word = (word & np.uint64(0x0000003F0000003F)) | ((word & np.uint64(0x00000FC000000FC0)) << np.uint64(10))
    return (word & np.uint64(0x0007000700070007)) | ((word & np.uint64(0x0038003800380038)) << np.uint64(5))


@numba.njit
def bucket_keys(bucket, lo, hi):
    """Returns the two words from which a bucket's random numbers are drawn."""
    k0 = mix(np.uint32(lo + np.uint32(np.uint32(bucket) * _GOLDEN)), np.uint32(0))
    return k0, mix(np.uint32(hi ^ k0), np.uint32(0))


def _round_bucket(x, norm, keys, bits, family, codes):
    """Writes a bucket's codes; the type of `family` decides which loop, so that one is compiled."""
    raise NotImplementedError("only called from compiled code")


@overload(_round_bucket)
def _choose_loop(x, norm, keys, bits, family, codes):
    if isinstance(family, types.Array):
        return _table_codes
    if isinstance(family, types.BaseTuple):
        return _exponential_codes if family[0] == types.boolean else _float_codes  # type: ignore[comparison-overlap, index]
    return _uniform_codes


@cached
@numba.njit(nogil=True)
def _encode_range(x, first, last, size, l2, bits, family, key, norms, packed):
    """Encodes buckets `first .. last`."""
    codes = np.zeros(size, dtype=np.uint8)
    patterns = x.view(np.int32)
    bucket_bytes = size * bits // 8
    for bucket in range(first, last):
        start = bucket * size
        length = min(size, x.size - start)
        part = x[start : start + length]
        norm_bits = _norm_bits(part, patterns[start : start + length], l2)
        norms[bucket] = norm_bits
        codes[length:] = np.uint8(0)
        if norm_bits == 0 or norm_bits >= _INF_BITS:
            codes[:] = np.uint8(0)
        else:
            keys = bucket_keys(bucket, key[0], key[1])
            _round_bucket(part, float_of_bits(norm_bits), keys, bits, family, codes)
        offset = bucket * bucket_bytes
        pack(codes, packed[offset : offset + (length * bits + 7) // 8], bits)


def _family_argument(form: NUQFormat) -> Any:  # noqa: ANN401  # its type selects the loop
    levels = np.asarray(form.levels, dtype=np.float32)
    if form.family == "table":
        return levels
    if form.family == "uniform":
        return np.float32(form.top)
    mantissa_bits = form.mantissa_bits or False  # a type of its own for exponential levels
    return (mantissa_bits, levels[1], np.float32(form.inverse_lowest))


@numba.njit
def _unpack(packed, bits, codes):
    """Unpacks what `pack` has packed; the rest of the last group of `codes` is left as it was."""
    if bits == 4:
        for j in range(packed.size):
            codes[2 * j] = np.uint8(packed[j] & np.uint8(15))
            codes[2 * j + 1] = np.uint8(packed[j] >> np.uint8(4))
    elif bits == 2:
        for j in range(packed.size):
            for k in range(4):
                codes[4 * j + k] = np.uint8(np.uint8(packed[j] >> np.uint8(2 * k)) & np.uint8(3))
    else:
        whole = packed.size // 3
        words = codes.view(np.uint64)
        for g in range(whole):
            low = np.uint64(packed[3 * g]) | np.uint64(packed[3 * g + 1]) << np.uint64(8)
            words[g] = _split_3bit(low | np.uint64(packed[3 * g + 2]) << np.uint64(16))
        if 3 * whole < packed.size:
            last = np.uint64(0)
            for k in range(packed.size - 3 * whole):
                last |= np.uint64(packed[3 * whole + k]) << np.uint64(8 * k)
            words[whole] = _split_3bit(last)


@cached
@numba.njit(nogil=True)
def _decode_range(norms, packed, first, last, size, bits, levels, out):
    """Decodes buckets `first .. last` of all messages, adding in row order; a bucket stays in the cache."""
    messages = norms.shape[0]
    table = np.empty_like(levels)
    buffer = np.zeros(size, dtype=np.uint8)
    bucket_bytes = size * bits // 8
    for bucket in range(first, last):
        start = bucket * size
        part = out[start : min(start + size, out.size)]
        for message in range(messages):
            norm = norms[message, bucket]
            if not np.isfinite(norm):
                norm = np.float32(np.nan)
            for level in range(levels.size):
                table[level] = levels[level] * norm
            offset = bucket * bucket_bytes
            codes = packed[message, offset : offset + (part.size * bits + 7) // 8]
            if bits < 8:
                _unpack(codes, bits, buffer)
                codes = buffer
            if message == 0:
                for j in range(part.size):
                    part[j] = table[codes[j]]
            else:
                for j in range(part.size):
                    part[j] += table[codes[j]]
        if messages > 1:
            for j in range(part.size):
                part[j] = part[j] / np.float32(messages)


def encode(x: Tensor, form: NUQFormat, seed: int, out: Tensor) -> None:
    """Encodes `x` into `out`; see `lightning_n2uq.ops.gradient_codec.nuq_encode`."""
    numel = x.numel()
    data, message = x.numpy(), out.numpy()
    start = form.norm_bytes(numel)
    norms = np.empty(form.num_buckets(numel), dtype=np.int32)  # apart, because `out` need not be aligned
    packed = message[start:]
    family = _family_argument(form)
    lo, hi = message_key(seed)
    key = (np.uint32(lo), np.uint32(hi))

    def kernel(first: int, last: int) -> None:
        _encode_range(
            data, first, last, form.bucket_size, form.norm == "l2", form.bits, family, key, norms, packed
        )

    run_ranges(kernel, len(norms), max(1, _SMALLEST_RANGE // form.bucket_size))
    message[:start] = norms.view(np.uint8)


def decode_mean(payloads: Tensor, form: NUQFormat, numel: int, out: Tensor) -> None:
    """Decodes and averages into `out`; see `lightning_n2uq.ops.gradient_codec.nuq_decode_mean`."""
    rows = payloads.numpy()
    start = form.norm_bytes(numel)
    norms = rows[:, :start].copy().view(np.float32)  # a copy, because rows need not be 4-byte aligned
    packed = rows[:, start:]
    levels = form.signed_levels().numpy()
    result = out.numpy()

    def kernel(first: int, last: int) -> None:
        _decode_range(norms, packed, first, last, form.bucket_size, form.bits, levels, result)

    run_ranges(kernel, norms.shape[1], max(1, _SMALLEST_RANGE // form.bucket_size))
