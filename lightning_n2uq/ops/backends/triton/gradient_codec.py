# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton kernels of the gradient codec, one program per bucket (encode) or per tile of one (decode).

`encode` replaces `encode_reference`, `decode_mean` replaces `decode_mean_reference`, with the same bytes and
bits: norms are exact integer sums, divisions and conversions are the IEEE ones, and fused multiply-adds are
off because they round once where the reference does twice. Under `TRITON_INTERPRET=1` the kernels run on CPU
tensors, which is how they are tested without a GPU.

Nothing waits for the device.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_n2uq.ops.backends.common.rng import message_key
from lightning_n2uq.ops.backends.triton.product import divided
from lightning_n2uq.ops.backends.triton.rounding import ABS, mix, quotient_of, rounded, weyl
from lightning_n2uq.ops.formats.gradient_codec import NUQFormat

_TILE = 1024
_ENCODE_WARPS = 2  # 16 values of a bucket of 1024 per thread: measured best of 1, 2 and 4
_MOST_INVERSE = 2.0**60  # beyond it, levels are so small that only the full division tells them apart
_GROUPS = {2: (4, 1), 3: (8, 3), 4: (4, 2), 8: (4, 4)}  # bits: how many codes fill how many whole bytes
_FAMILIES = {"float": 0, "uniform": 1, "table": 2}
_INF_BITS = tl.constexpr(0x7F800000)
_NAN_BITS = tl.constexpr(0x7FC00000)


@triton.jit
def _magnitudes(x_ptr, start, tile, length, GROUP: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr):
    """Returns bit patterns of a tile `[TILE / GROUP, GROUP]`, zeros behind the end, and their places.

    In a full bucket nothing is behind the end, so that loads are as wide as can be.
    """
    place = tile + tl.arange(0, TILE // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if FULL:
        pattern = tl.load(x_ptr + start + place)
    else:
        pattern = tl.load(x_ptr + start + place, mask=place < length, other=0)
    return pattern, place


@triton.jit
def _squares(pattern, up, down):
    """Returns squares of magnitudes as whole numbers; `up * down` brings the largest to 24 bits."""
    whole = ((pattern & ABS).to(tl.float32, bitcast=True) * up * down).to(tl.int32).to(tl.int64)
    return whole * whole


@triton.jit
def _power_of_two(exponent):
    """Returns `2**exponent`, float32, for exponents of normal numbers."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _largest_and_norm(
    x_ptr, held, start, length,
    SIZE: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, L2: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Returns bit patterns of the bucket's largest magnitude and of its norm.

    The l2 norm is an exact sum of squares of 24-bit numbers, then an fp64 square root, then fp32. A bucket of
    one tile is `held` already.
    """
    largest = tl.max(tl.max(held & ABS, axis=1), axis=0)
    for tile in range(TILE, SIZE, TILE):
        pattern, _ = _magnitudes(x_ptr, start, tile, length, GROUP, TILE, FULL)
        largest = tl.maximum(largest, tl.max(tl.max(pattern & ABS, axis=1), axis=0))
    norm = largest
    if L2:
        top = tl.maximum(largest >> 23, 1)
        up, down = _power_of_two(tl.minimum(150 - top, 127)), _power_of_two(tl.maximum(23 - top, 0))
        total = tl.sum(tl.sum(_squares(held, up, down), axis=1), axis=0)
        for tile in range(TILE, SIZE, TILE):
            pattern, _ = _magnitudes(x_ptr, start, tile, length, GROUP, TILE, FULL)
            total += tl.sum(tl.sum(_squares(pattern, up, down), axis=1), axis=0)
        root = tl.sqrt(total.to(tl.float64))
        unit = ((top.to(tl.int64) + 873) << 52).to(tl.float64, bitcast=True)  # 2**(top - 150), exact
        norm = (root * unit).to(tl.float32).to(tl.int32, bitcast=True)
    return largest, norm


@triton.jit
def _store_word(packed_ptr, group, word, length, BITS: tl.constexpr, GROUP_BYTES: tl.constexpr,
    FULL: tl.constexpr, WHOLE: tl.constexpr,
) -> None:  # fmt: skip
    """Writes the bytes of every group of codes, lowest first; as one number where memory allows."""
    if FULL and WHOLE:
        number: tl.constexpr = tl.uint16 if GROUP_BYTES == 2 else tl.uint32
        words_ptr = packed_ptr.to(tl.pointer_type(number), bitcast=True)
        tl.store(words_ptr + group, word.to(number))
    else:
        for byte_index in tl.static_range(GROUP_BYTES):
            byte = ((word >> (8 * byte_index)) & 255).to(tl.uint8)
            offset = group * GROUP_BYTES + byte_index
            if FULL:
                tl.store(packed_ptr + offset, byte)
            else:
                tl.store(packed_ptr + offset, byte, mask=offset < (length * BITS + 7) // 8)


@triton.jit
def _encode_bucket(
    x_ptr, out_ptr, levels_ptr, bucket, length, lo, hi, inverse_lowest, norm_bytes,
    SIZE: tl.constexpr, TILE: tl.constexpr, L2: tl.constexpr, BITS: tl.constexpr, FAMILY: tl.constexpr,
    MANTISSA: tl.constexpr, GROUP: tl.constexpr, GROUP_BYTES: tl.constexpr, FAST: tl.constexpr,
    LARGEST: tl.constexpr, WHOLE: tl.constexpr, FULL: tl.constexpr,
) -> None:  # fmt: skip
    """Writes norm, codes and packed bytes of one bucket.

    Norms are stored byte by byte, since a message need not begin at a multiple of four.
    """
    SIGN: tl.constexpr = 1 << (BITS - 1)
    start = bucket * SIZE
    held, _ = _magnitudes(x_ptr, start, 0, length, GROUP, TILE, FULL)
    largest, norm_bits = _largest_and_norm(x_ptr, held, start, length, SIZE, TILE, GROUP, L2, FULL)
    norm_bits = tl.where(largest >= _INF_BITS, _NAN_BITS, tl.where(largest == 0, 0, norm_bits))
    byte = tl.arange(0, 4)
    tl.store(out_ptr + bucket * 4 + byte, ((norm_bits >> (8 * byte)) & 255).to(tl.uint8))
    usable = (norm_bits > 0) & (norm_bits < _INF_BITS)
    norm = tl.where(usable, norm_bits, 0x3F800000).to(tl.float32, bitcast=True)
    zero = tl.full([], 0, tl.uint32)
    k0 = mix(weyl(lo.to(tl.uint32), bucket), zero)
    k1 = mix(hi.to(tl.uint32) ^ k0, zero)
    member = tl.arange(0, GROUP)[None, :]
    packed_ptr = out_ptr + norm_bytes + bucket * (SIZE * BITS // 8)
    for tile in range(0, SIZE, TILE):
        if SIZE == TILE:
            pattern = held
            position = tl.arange(0, TILE // GROUP)[:, None] * GROUP + member
        else:
            pattern, position = _magnitudes(x_ptr, start, tile, length, GROUP, TILE, FULL)
        if FAST:
            ratio = quotient_of(pattern, norm)
        else:
            magnitude = (pattern & ABS).to(tl.float32, bitcast=True)
            ratio = divided(magnitude, tl.zeros_like(magnitude) + norm)
        random = mix(weyl(k0, position), k1)
        code = rounded(ratio, random, levels_ptr, inverse_lowest, BITS, FAMILY, MANTISSA)
        if not FULL:
            code = tl.where(position < length, code, 0)
        word = tl.sum(code << (member * BITS), axis=1)
        minus = tl.sum((pattern >> 31) & (SIGN << (member * BITS)), axis=1)
        signed = word | (minus & (word + LARGEST))  # the sum has a sign bit where a code is not 0
        word = tl.where(usable, signed, 0)
        group = tile // GROUP + tl.arange(0, TILE // GROUP)
        _store_word(packed_ptr, group, word, length, BITS, GROUP_BYTES, FULL, WHOLE)


@triton.jit(do_not_specialize=["lo", "hi"])
def _encode_kernel(
    x_ptr, out_ptr, levels_ptr, numel, lo, hi, inverse_lowest, norm_bytes,
    SIZE: tl.constexpr, TILE: tl.constexpr, L2: tl.constexpr, BITS: tl.constexpr, FAMILY: tl.constexpr,
    MANTISSA: tl.constexpr, GROUP: tl.constexpr, GROUP_BYTES: tl.constexpr, FAST: tl.constexpr,
    LARGEST: tl.constexpr, WHOLE: tl.constexpr,
) -> None:  # fmt: skip
    """Encodes one bucket; `x_ptr` points to bit patterns (int32). Only the last may have an end within.

    `LARGEST` is a word of largest codes without signs, `WHOLE` says whether words are stored as one number.
    """
    bucket = tl.program_id(0).to(tl.int64)
    length = tl.minimum(numel - bucket * SIZE, SIZE).to(tl.int32)
    if length == SIZE:
        _encode_bucket(
            x_ptr, out_ptr, levels_ptr, bucket, SIZE, lo, hi, inverse_lowest, norm_bytes, SIZE, TILE, L2,
            BITS, FAMILY, MANTISSA, GROUP, GROUP_BYTES, FAST, LARGEST, WHOLE, SIZE % TILE == 0,
        )  # fmt: skip
    else:
        _encode_bucket(
            x_ptr, out_ptr, levels_ptr, bucket, length, lo, hi, inverse_lowest, norm_bytes, SIZE, TILE, L2,
            BITS, FAMILY, MANTISSA, GROUP, GROUP_BYTES, FAST, LARGEST, WHOLE, False,
        )  # fmt: skip


@triton.jit
def _value(
    packed_ptr, norms_ptr, levels_ptr, bucket, position, inside, SIZE: tl.constexpr, BITS: tl.constexpr
):
    """Returns decoded values of a tile of one message."""
    norm_bits = tl.load(norms_ptr + bucket)
    finite = (norm_bits >= 0) & (norm_bits < _INF_BITS)  # a negative norm is malformed: NaN, without waiting
    norm = tl.where(finite, norm_bits, _NAN_BITS).to(tl.float32, bitcast=True)
    bit = position * BITS
    byte_ptr = packed_ptr + bucket * (SIZE * BITS // 8) + (bit >> 3)
    word = tl.load(byte_ptr, mask=inside, other=0).to(tl.int32)
    if BITS == 3:
        straddles = inside & ((bit & 7) > 5)
        word = word | (tl.load(byte_ptr + 1, mask=straddles, other=0).to(tl.int32) << 8)
    code = (word >> (bit & 7)) & ((1 << BITS) - 1)
    return tl.load(levels_ptr + code) * norm


@triton.jit
def _decode_kernel(
    norms_ptr,
    packed_ptr,
    levels_ptr,
    out_ptr,
    numel,
    messages,
    norm_stride,
    packed_stride,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
):
    """Decodes one tile of one bucket of all messages and averages; norms are bit patterns (int32)."""
    bucket = tl.program_id(0).to(tl.int64)
    start = bucket * SIZE
    position = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (position < SIZE) & (start + position < numel)
    total = _value(packed_ptr, norms_ptr, levels_ptr, bucket, position, inside, SIZE, BITS)
    for message in range(1, messages):
        row = tl.cast(message, tl.int64)
        packed = packed_ptr + row * packed_stride
        norms = norms_ptr + row * norm_stride
        total += _value(packed, norms, levels_ptr, bucket, position, inside, SIZE, BITS)
    if messages > 1:
        total = divided(total, tl.zeros_like(total) + messages)
    tl.store(out_ptr + start + position, total, mask=inside)


@functools.cache
def _levels(form: NUQFormat, device: torch.device) -> Tensor:
    return torch.tensor(form.levels, dtype=torch.float32, device=device)


@functools.cache
def _signed_levels(form: NUQFormat, device: torch.device) -> Tensor:
    return form.signed_levels().to(device)


def encode(x: Tensor, form: NUQFormat, seed: int, out: Tensor) -> None:
    """Encodes `x` into `out`; see `lightning_n2uq.ops.gradient_codec.nuq_encode`."""
    numel = x.numel()
    lo, hi = (word - (word >> 31 << 32) for word in message_key(seed))  # as int32, so that types never change
    group, group_bytes = _GROUPS[form.bits]
    largest = sum((2 ** (form.bits - 1) - 1) << (member * form.bits) for member in range(group))
    _encode_kernel[(form.num_buckets(numel),)](
        x.view(torch.int32), out, _levels(form, x.device), numel, lo, hi, form.inverse_lowest,
        form.norm_bytes(numel), SIZE=form.bucket_size, TILE=_tile(form), L2=form.norm == "l2", BITS=form.bits,
        FAMILY=_FAMILIES[form.family], MANTISSA=form.mantissa_bits, GROUP=group, GROUP_BYTES=group_bytes,
        FAST=form.family == "float" and form.inverse_lowest <= _MOST_INVERSE,
        LARGEST=largest, WHOLE=group_bytes in (2, 4) and out.data_ptr() % group_bytes == 0,
        num_warps=_ENCODE_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def decode_mean(payloads: Tensor, form: NUQFormat, numel: int, out: Tensor) -> None:
    """Decodes and averages into `out`; see `lightning_n2uq.ops.gradient_codec.nuq_decode_mean`."""
    start = form.norm_bytes(numel)
    norms = payloads[:, :start]
    if norms.data_ptr() % 4 or norms.stride(0) % 4:
        norms = norms.clone(memory_format=torch.contiguous_format)
    norms = norms.view(torch.int32)
    packed = payloads[:, start:]
    tile = _tile(form)
    grid = (form.num_buckets(numel), triton.cdiv(form.bucket_size, tile))
    _decode_kernel[grid](
        norms, packed, _signed_levels(form, out.device), out, numel, len(payloads), norms.stride(0),
        packed.stride(0), SIZE=form.bucket_size, TILE=tile, BITS=form.bits, enable_fp_fusion=False,
    )  # fmt: skip


def _tile(form: NUQFormat) -> int:
    return min(_TILE, int(triton.next_power_of_2(form.bucket_size)))
