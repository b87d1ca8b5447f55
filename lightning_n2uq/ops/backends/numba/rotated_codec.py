# Compiled functions take no annotations: numba infers the types of their arguments.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Numba kernels of the rotated codec: a bucket is rotated, rounded and packed while it is in the cache.

They give the bytes and bits of `lightning_n2uq.ops.backends.reference.rotated_codec`, for any number of
threads. The work is split by buckets.
"""

import itertools
from typing import Any

import numba
import numpy as np
from numba.extending import overload
from torch import Tensor

from lightning_n2uq.ops.backends.common.kernel_cache import cached
from lightning_n2uq.ops.backends.common.rng import GOLDEN, message_key
from lightning_n2uq.ops.backends.common.threads import run_ranges
from lightning_n2uq.ops.backends.numba.gradient_codec import (
    bits_of,
    bucket_keys,
    double_of_bits,
    float_of_bits,
    mix,
    pack,
    squares,
    whole_factors,
)
from lightning_n2uq.ops.backends.numba.hadamard import sign_words, transform
from lightning_n2uq.ops.backends.numba.vectors import levels_of_codes
from lightning_n2uq.ops.formats.rotated_codec import GROUP, KEY_BYTES, RotatedFormat
from lightning_n2uq.ops.gaussian_levels import NEAREST_UNIT

_SMALLEST_RANGE = 32768  # coordinates per thread below which a second thread costs more than it saves
_GOLDEN = np.uint32(GOLDEN)
_INF_BITS = np.int32(0x7F800000)
_NAN_BITS = np.int32(0x7FC00000)
_ABS = np.int32(0x7FFFFFFF)
_PARTS = np.float32(2.0**-21)
_UNITS = np.float64(1 / NEAREST_UNIT)
_write, _add = levels_of_codes(False), levels_of_codes(True)


@numba.njit
def _largest(x):
    """Returns the bit pattern of the largest magnitude."""
    patterns = x.view(np.int32)
    largest = np.int32(0)
    for j in range(patterns.size):
        largest = max(largest, np.int32(patterns[j] & _ABS))
    return largest


@numba.njit
def _powers(exponent):
    """Returns two powers of two whose product is `2**exponent`."""
    half = np.int32(exponent >> 1)
    rest = np.int32(exponent - half)
    return float_of_bits(np.int32((half + 127) << 23)), float_of_bits(np.int32((rest + 127) << 23))


@numba.njit
def _flipped(value, word, j):
    """Returns `value` with its sign flipped where bit `j` of `word` is set."""
    return float_of_bits(np.int32(bits_of(value) ^ np.int32(np.int32(np.int32(word) >> j) << np.int32(31))))


@numba.njit
def _rotate(x, exponent, words, u):
    """Writes the rotated bucket to `u`, padded with zeros behind the end of `x`."""
    first, second = _powers(exponent)
    whole = x.size // 32
    for block in range(whole):
        word = words[block]
        for j in range(32):
            value = np.float32(np.float32(x[32 * block + j] * first) * second)
            u[32 * block + j] = _flipped(value, word, np.int32(j))
    for j in range(32 * whole, x.size):
        value = np.float32(np.float32(x[j] * first) * second)
        u[j] = _flipped(value, words[whole], np.int32(j - 32 * whole))
    u[x.size :] = np.float32(0)
    transform(u)


def _levels_below(ratio, t, lows, gaps):
    raise NotImplementedError("only called from compiled code")


@overload(_levels_below)
def _choose_levels_below(ratio, t, lows, gaps):
    """Counts the levels that `ratio` goes above: `ratio > low + t * gap`; the tuple's length unrolls it."""
    if len(lows) == 0:
        return lambda ratio, t, lows, gaps: np.int32(0)
    half = len(lows) // 2
    if half == 0:
        return lambda ratio, t, lows, gaps: np.int32(ratio > np.float32(lows[0] + np.float32(t * gaps[0])))
    return lambda ratio, t, lows, gaps: np.int32(
        _levels_below(ratio, t, lows[:half], gaps[:half]) + _levels_below(ratio, t, lows[half:], gaps[half:])
    )


@numba.njit
def _round_group(u, first, scale, keys, levels, gaps, codes):
    """Rounds a group stochastically to codes."""
    k0, k1 = keys
    lowest = levels[0]
    top = np.int32(np.int32(len(levels)))
    for j in range(u.size):
        random = mix(np.uint32(k0 + np.uint32(np.uint32(first + j) * _GOLDEN)), k1)
        part = np.int32(np.uint32(np.uint32(random >> np.uint32(12)) << np.uint32(1)) | np.uint32(1))
        t = np.float32(np.float32(part) * _PARTS)
        ratio = np.float32(abs(u[j]) / scale)
        magnitude = _levels_below(ratio, t, levels[:-1], gaps)
        kept = ratio > np.float32(np.float32(t * np.float32(lowest + lowest)) - lowest)
        negative = (bits_of(u[j]) < np.int32(0)) == kept
        codes[j] = np.uint8(magnitude | (top if negative else np.int32(0)))


@numba.njit
def _stochastic(u, keys, family, shares, codes):
    """Writes codes and groups' bytes of a rotated bucket; returns its scale."""
    levels, gaps = family
    top = float_of_bits(_largest(u))
    size = min(GROUP, u.size)
    for group in range(shares.size):
        first = group * size
        part = u[first : first + size]
        largest = float_of_bits(_largest(part))
        share = np.float32(np.float32(largest / top) * np.float32(255))
        shares[group] = np.uint8(np.int32(np.ceil(share)))
        scale = np.float32(top * np.float32(np.float32(shares[group]) / np.float32(255)))
        if scale == np.float32(0):
            scale = np.float32(1)
        _round_group(part, first, scale, keys, levels, gaps, codes[first : first + size])
    return np.float64(top)


def _nearest_code(magnitude, norm, borders, steps):
    raise NotImplementedError("only called from compiled code")


@overload(_nearest_code)
def _choose_nearest_code(magnitude, norm, borders, steps):
    """Returns how many borders a magnitude is above, and by how much its level exceeds the lowest."""
    if len(borders) == 0:
        return lambda magnitude, norm, borders, steps: (np.int32(0), np.int32(0))
    half = len(borders) // 2
    if half == 0:

        def one(magnitude, norm, borders, steps):
            above = np.int32(magnitude > np.float32(norm * borders[0]))
            return above, np.int32(above * steps[0])

        return one

    def both(magnitude, norm, borders, steps):
        code1, level1 = _nearest_code(magnitude, norm, borders[:half], steps[:half])
        code2, level2 = _nearest_code(magnitude, norm, borders[half:], steps[half:])
        return np.int32(code1 + code2), np.int32(level1 + level2)

    return both


@numba.njit
def _nearest(u, borders, lowest, steps, codes):
    """Writes the codes of nearest levels of a rotated bucket; returns EDEN's scale."""
    scale1, scale2, unit = whole_factors(_largest(u))
    total = squares(u, scale1, scale2)
    norm = np.float32(np.sqrt(np.float64(total)) * unit)
    product = np.uint64(0)
    sign_bit = np.int32(len(borders) + 1)
    for j in range(u.size):
        magnitude = np.float32(abs(u[j]))
        code, level = _nearest_code(magnitude, norm, borders, steps)
        whole = np.uint32(np.int32(np.float32(np.float32(magnitude * scale1) * scale2)))
        product += np.uint64(whole) * np.uint64(np.uint32(np.int32(level + lowest)))
        codes[j] = np.uint8(code | (sign_bit if bits_of(u[j]) < np.int32(0) else np.int32(0)))
    if product == np.uint64(0):
        product = np.uint64(1)
    return np.float64(total) * _UNITS / np.float64(product) * unit


def _codes_of(u, keys, family, shares, codes):
    raise NotImplementedError("only called from compiled code")


@overload(_codes_of)
def _choose_rounding(u, keys, family, shares, codes):
    if len(family) == 2:
        return lambda u, keys, family, shares, codes: _stochastic(u, keys, family, shares, codes)
    return lambda u, keys, family, shares, codes: _nearest(u, family[0], family[1], family[2], codes)


@numba.njit
def _log2(size):
    count = np.int64(0)
    while size > 1:
        size >>= 1
        count += 1
    return count


@cached
@numba.njit(nogil=True, error_model="numpy")
def _encode_range(x, first, last, size, rest, bits, family, key, rotation, scales, shares, packed):
    """Encodes buckets `first .. last`; `rest` is the padded size of the last, shorter one."""
    u = np.empty(size, dtype=np.float32)
    codes = np.empty(size, dtype=np.uint8)
    words = np.empty((size + 31) // 32, dtype=np.int32)
    per_bucket = -(-size // GROUP)
    for bucket in range(first, last):
        start = bucket * size
        part = x[start : start + size]
        padded = size if part.size == size else rest
        groups = shares[bucket * per_bucket : bucket * per_bucket + -(-padded // GROUP)]
        target = packed[start * bits // 8 : (start + padded) * bits // 8]
        largest = _largest(part)
        if largest == 0 or largest >= _INF_BITS:
            scales[bucket] = _NAN_BITS if largest else np.int32(0)
            groups[:] = np.uint8(0)
            target[:] = np.uint8(0)
            continue
        exponent = 127 - max(np.int64(largest >> 23), 1)  # type: ignore[operator]
        sign_words(bucket, rotation, padded, words)
        rotated = u[:padded]
        _rotate(part, exponent, words, rotated)
        keys = bucket_keys(bucket, key[0], key[1])
        scale = _codes_of(rotated, keys, family, groups, codes[:padded])
        power = 1023 - exponent - _log2(padded) // 2
        scales[bucket] = bits_of(np.float32(scale * double_of_bits(np.int64(power) << 52)))
        pack(codes[:padded], target, bits)


@numba.njit
def _finite(scale):
    return scale if np.isfinite(scale) and scale >= 0 else np.float32(np.nan)


@numba.njit
def _scaling(scales, bucket):
    """Returns the power of two by which a bucket's scales are multiplied."""
    top = np.int32(0)
    for message in range(scales.shape[0]):
        top = max(top, bits_of(_finite(scales[message, bucket])))
    return 127 - min(max(np.int64(top >> 23), 1), 254)  # type: ignore[operator]


def _scaled(levels, scale):
    raise NotImplementedError("only called from compiled code")


@overload(_scaled)
def _choose_scaled(levels, scale):
    """Returns the levels times a scale, a tuple again."""
    if len(levels) == 1:
        return lambda levels, scale: (np.float32(levels[0] * scale),)
    half = len(levels) // 2
    return lambda levels, scale: _scaled(levels[:half], scale) + _scaled(levels[half:], scale)


@numba.njit
def _unpack(codes, bits, levels, shares, scale, add, u):
    """Writes (or adds) what the codes of a bucket stand for, before it is rotated back."""
    size = min(GROUP, u.size) if shares.size else u.size
    for group in range(u.size // size):
        own = scale
        if shares.size:
            own = np.float32(scale * np.float32(np.float32(shares[group]) / np.float32(255)))
        scaled = _scaled(levels, own)
        start = group * size
        if add:
            for j in range(start, start + size, 8):
                _add(codes, j // 8 * bits, scaled, u, j)
        else:
            for j in range(start, start + size, 8):
                _write(codes, j // 8 * bits, scaled, u, j)


@numba.njit
def _add_back(u, words, add, total):
    """Flips signs and writes (or adds) the result."""
    for block in range((u.size + 31) // 32):
        word = words[block]
        for j in range(min(32, u.size)):
            value = _flipped(u[32 * block + j], word, np.int32(j))
            total[32 * block + j] = total[32 * block + j] + value if add else value


@cached
@numba.njit(nogil=True, error_model="numpy")
def _decode_range(keys, same, scales, shares, packed, first, last, size, rest, bits, levels, out):
    """Decodes and averages buckets `first .. last` of all messages."""
    messages = scales.shape[0]
    u = np.empty(size, dtype=np.float32)
    total = np.empty(size, dtype=np.float32)
    words = np.empty((size + 31) // 32, dtype=np.int32)
    per_bucket = -(-size // GROUP) if shares.shape[1] else 0
    for bucket in range(first, last):
        start = bucket * size
        part = out[start : start + size]
        padded = size if part.size == size else rest
        groups = -(-padded // GROUP) if per_bucket else 0
        exponent = _scaling(scales, bucket)
        up, further = _powers(exponent)
        rotated, mean = u[:padded], total[:padded]
        for message in range(messages):
            scale = np.float32(np.float32(_finite(scales[message, bucket]) * up) * further)
            own = shares[message, bucket * per_bucket : bucket * per_bucket + groups]
            codes = packed[message, start * bits // 8 : (start + padded) * bits // 8]
            _unpack(codes, bits, levels, own, scale, same and message > 0, rotated)
            if not same or message == messages - 1:
                transform(rotated)
                sign_words(bucket, (keys[message, 0], keys[message, 1]), padded, words)
                _add_back(rotated, words, not same and message > 0, mean)
        log2 = _log2(padded)
        back, further = _powers(log2 // 2 - log2 - exponent)
        if messages > 1:
            for j in range(part.size):
                part[j] = np.float32(np.float32(mean[j] / np.float32(messages)) * back) * further
        else:
            for j in range(part.size):
                part[j] = np.float32(mean[j] * back) * further


def _family(form: RotatedFormat, size: int) -> tuple[Any, ...]:
    """Returns what the compiled rounding needs; the tuples' types select it."""
    if form.stochastic:
        levels = _floats(form.levels)
        return levels, tuple(high - low for low, high in itertools.pairwise(levels))
    integers = [round(level / NEAREST_UNIT) for level in form.levels]
    steps = tuple(np.int32(high - low) for low, high in itertools.pairwise(integers))
    return _floats(form.borders(size)), np.int32(integers[0]), steps


def _floats(values: tuple[float, ...]) -> tuple[np.float32, ...]:
    return tuple(np.float32(value) for value in values)


def encode(x: Tensor, form: RotatedFormat, seed: int, out: Tensor) -> None:
    """Encodes `x` into `out`; see `lightning_n2uq.ops.gradient_codec.rotated_encode`."""
    numel, size = x.numel(), form.bucket_size
    data, message = x.numpy(), out.numpy()
    whole, rest = form.sizes(numel)
    begin, end = form.groups_start(numel), form.codes_start(numel)
    scales = np.empty(form.num_buckets(numel), dtype=np.int32)  # apart, because `out` need not be aligned
    shares, packed = message[begin:end], message[end:]
    key, rotation = (
        tuple(np.uint32(word) for word in words) for words in (message_key(seed), form.key(seed))
    )
    message[:KEY_BYTES] = np.array(rotation, dtype=np.uint32).view(np.uint8)

    def kernel(first: int, last: int, of: int = size) -> None:
        family = _family(form, of)
        _encode_range(data, first, last, size, rest, form.bits, family, key, rotation, scales, shares, packed)

    if whole:
        run_ranges(kernel, whole, max(1, _SMALLEST_RANGE // size))
    if rest:
        kernel(whole, whole + 1, rest)
    message[KEY_BYTES:begin] = scales.view(np.uint8)


def decode_mean(payloads: Tensor, form: RotatedFormat, numel: int, out: Tensor) -> None:
    """Decodes and averages into `out`; see `lightning_n2uq.ops.gradient_codec.rotated_decode_mean`."""
    rows, size = payloads.numpy(), form.bucket_size
    _, rest = form.sizes(numel)
    begin, end = form.groups_start(numel), form.codes_start(numel)
    keys = rows[:, :KEY_BYTES].copy().view(np.uint32)  # copies, because rows need not be 4-byte aligned
    scales = rows[:, KEY_BYTES:begin].copy().view(np.float32)
    shares, packed = rows[:, begin:end], rows[:, end:]
    same = bool((keys == keys[0]).all())
    levels, result = _floats(form.levels), out.numpy()

    def kernel(first: int, last: int) -> None:
        _decode_range(keys, same, scales, shares, packed, first, last, size, rest, form.bits, levels, result)

    run_ranges(kernel, scales.shape[1], max(1, _SMALLEST_RANGE // size))
