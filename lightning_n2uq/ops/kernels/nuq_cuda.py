# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton kernels of the gradient codec, one program per bucket (encode) or per tile of one (decode).

`encode` replaces `nuq_reference.encode_reference`, `decode_mean` replaces
`nuq_reference.decode_mean_reference`, with the same bytes and bits: norms are exact integer sums, divisions
and conversions are the IEEE ones, and fused multiply-adds are off because they round once where the oracle
rounds twice. Under `TRITON_INTERPRET=1` the kernels run on CPU tensors, which is how they are tested
without a GPU.

Nothing waits for the device.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_n2uq.ops.kernels.rng import GOLDEN, M1, M2, message_key
from lightning_n2uq.ops.nuq_format import NUQFormat

_TILE = 1024
_GROUPS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # bits: how many codes fill how many whole bytes
_FAMILIES = {"float": 0, "uniform": 1, "table": 2}
_GOLDEN, _M1, _M2 = tl.constexpr(GOLDEN), tl.constexpr(M1), tl.constexpr(M2)
_INF_BITS = tl.constexpr(0x7F800000)
_NAN_BITS = tl.constexpr(0x7FC00000)
_ABS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _mix(x, key):
    """`rng._mix` on uint32."""
    x = (x ^ (x >> 16)) * tl.full([], _M1, tl.uint32)
    x = x ^ key
    x = (x ^ (x >> 13)) * tl.full([], _M2, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _weyl(start, position):
    return start + position.to(tl.uint32) * tl.full([], _GOLDEN, tl.uint32)


@triton.jit
def _largest(x_ptr, start, length, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Largest bit pattern of the bucket's magnitudes."""
    lane = tl.arange(0, TILE)
    largest = tl.zeros([TILE], tl.int32)
    for tile in range(0, SIZE, TILE):
        pattern = tl.load(x_ptr + start + tile + lane, mask=tile + lane < length, other=0) & _ABS
        largest = tl.maximum(largest, pattern)
    return tl.max(largest, axis=0)


@triton.jit
def _l2_norm(x_ptr, start, length, largest, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Exact integer sum of squares of 24-bit magnitudes, then fp64 square root, then fp32 (as a pattern)."""
    lane = tl.arange(0, TILE)
    top = tl.maximum(largest >> 23, 1)
    total = tl.zeros([TILE], tl.int64)
    for tile in range(0, SIZE, TILE):
        pattern = tl.load(x_ptr + start + tile + lane, mask=tile + lane < length, other=0) & _ABS
        mantissa = (pattern & 0x7FFFFF) | tl.where(pattern >= 0x800000, 0x800000, 0)
        shift = tl.minimum(top - tl.maximum(pattern >> 23, 1), 31)
        scaled = (mantissa >> shift).to(tl.int64)
        total += scaled * scaled
    root = tl.sqrt(tl.sum(total, axis=0).to(tl.float64))
    unit = ((top.to(tl.int64) + 873) << 52).to(tl.float64, bitcast=True)  # 2**(top - 150), exact
    return (root * unit).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _round(
    ratio,
    random,
    levels_ptr,
    inverse_lowest,
    BITS: tl.constexpr,
    FAMILY: tl.constexpr,
    MANTISSA: tl.constexpr,
):
    """Magnitude codes (int32) of ratios in 0..1."""
    TOP: tl.constexpr = (1 << (BITS - 1)) - 1
    uniform01 = (random >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)
    if FAMILY == 0:
        SHIFT: tl.constexpr = 23 - MANTISSA
        noise = (random >> (32 - SHIFT)).to(tl.int32)
        code = ((ratio.to(tl.int32, bitcast=True) + noise) >> SHIFT) - ((127 << MANTISSA) - TOP)
        share = tl.minimum(ratio * inverse_lowest, 0.99999994) * 2147483648.0
        up = (random >> 1).to(tl.int32) < share.to(tl.int32)
        return tl.where(ratio < tl.load(levels_ptr + 1), up.to(tl.int32), code)
    if FAMILY == 1:
        scaled = ratio * TOP
        lower = scaled.to(tl.int32)
        return lower + (uniform01 < scaled - lower.to(tl.float32)).to(tl.int32)
    lower = tl.zeros_like(ratio).to(tl.int32)
    for halving in tl.static_range(BITS - 1):
        trial = lower + (1 << (BITS - 2 - halving))
        lower = tl.where((trial < TOP) & (tl.load(levels_ptr + trial) <= ratio), trial, lower)
    low = tl.load(levels_ptr + lower)
    gap = tl.load(levels_ptr + lower + 1) - low
    return lower + (uniform01 < tl.div_rn(ratio - low, gap)).to(tl.int32)


@triton.jit(do_not_specialize=["lo", "hi"])
def _encode_kernel(
    x_ptr,
    norms_ptr,
    packed_ptr,
    levels_ptr,
    numel,
    lo,
    hi,
    inverse_lowest,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    L2: tl.constexpr,
    BITS: tl.constexpr,
    FAMILY: tl.constexpr,
    MANTISSA: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
):
    """Norm, codes and packed bytes of one bucket; `x_ptr` and `norms_ptr` point to bit patterns (int32)."""
    bucket = tl.program_id(0).to(tl.int64)
    start = bucket * SIZE
    length = tl.minimum(numel - start, SIZE).to(tl.int32)
    largest = _largest(x_ptr, start, length, SIZE, TILE)
    norm_bits = largest
    if L2:
        norm_bits = _l2_norm(x_ptr, start, length, largest, SIZE, TILE)
    norm_bits = tl.where(largest >= _INF_BITS, _NAN_BITS, tl.where(largest == 0, 0, norm_bits))
    tl.store(norms_ptr + bucket, norm_bits)
    usable = (norm_bits > 0) & (norm_bits < _INF_BITS)
    norm = tl.where(usable, norm_bits, 0x3F800000).to(tl.float32, bitcast=True)
    zero = tl.full([], 0, tl.uint32)
    k0 = _mix(_weyl(lo.to(tl.uint32), bucket), zero)
    k1 = _mix(hi.to(tl.uint32) ^ k0, zero)
    group = tl.arange(0, TILE // GROUP)[:, None]
    member = tl.arange(0, GROUP)[None, :]
    first_byte = bucket * (SIZE * BITS // 8)
    for tile in range(0, SIZE, TILE):
        position = tile + group * GROUP + member
        pattern = tl.load(x_ptr + start + position, mask=position < length, other=0)
        ratio = tl.div_rn((pattern & _ABS).to(tl.float32, bitcast=True), norm)
        random = _mix(_weyl(k0, position), k1)
        code = _round(ratio, random, levels_ptr, inverse_lowest, BITS, FAMILY, MANTISSA)
        code = tl.where((pattern < 0) & (code > 0), code | (1 << (BITS - 1)), code)
        code = tl.where(usable & (position < length), code, 0)
        word = tl.sum(code << (member * BITS), axis=1)
        for byte in tl.static_range(GROUP_BYTES):
            offset = (tile // GROUP + tl.arange(0, TILE // GROUP)) * GROUP_BYTES + byte
            inside = offset < (length * BITS + 7) // 8
            tl.store(packed_ptr + first_byte + offset, ((word >> (8 * byte)) & 255).to(tl.uint8), mask=inside)


@triton.jit
def _value(
    packed_ptr, norms_ptr, levels_ptr, bucket, position, inside, SIZE: tl.constexpr, BITS: tl.constexpr
):
    """Decoded values of a tile of one message."""
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
        total = tl.div_rn(total, tl.zeros_like(total) + messages)
    tl.store(out_ptr + start + position, total, mask=inside)


@functools.cache
def _levels(form: NUQFormat, device: torch.device) -> Tensor:
    return torch.tensor(form.levels, dtype=torch.float32, device=device)


@functools.cache
def _signed_levels(form: NUQFormat, device: torch.device) -> Tensor:
    return form.signed_levels().to(device)


def encode(x: Tensor, form: NUQFormat, seed: int, out: Tensor) -> None:
    """See `lightning_n2uq.ops.nuq.nuq_encode`."""
    numel = x.numel()
    start, buckets = form.norm_bytes(numel), form.num_buckets(numel)
    norms = torch.empty(buckets, dtype=torch.int32, device=x.device)  # `out` need not be 4-byte aligned
    lo, hi = (word - (word >> 31 << 32) for word in message_key(seed))  # as int32, so that types never change
    group, group_bytes = _GROUPS[form.bits]
    _encode_kernel[(buckets,)](
        x.view(torch.int32), norms, out[start:], _levels(form, x.device), numel, lo, hi, form.inverse_lowest,
        SIZE=form.bucket_size, TILE=_tile(form), L2=form.norm == "l2", BITS=form.bits,
        FAMILY=_FAMILIES[form.family], MANTISSA=form.mantissa_bits, GROUP=group, GROUP_BYTES=group_bytes,
        enable_fp_fusion=False,
    )  # fmt: skip
    out[:start].copy_(norms.view(torch.uint8))


def decode_mean(payloads: Tensor, form: NUQFormat, numel: int, out: Tensor) -> None:
    """See `lightning_n2uq.ops.nuq.nuq_decode_mean`."""
    start = form.norm_bytes(numel)
    norms = payloads[:, :start].clone(memory_format=torch.contiguous_format).view(torch.int32)
    packed = payloads[:, start:]
    tile = _tile(form)
    grid = (form.num_buckets(numel), triton.cdiv(form.bucket_size, tile))
    _decode_kernel[grid](
        norms, packed, _signed_levels(form, out.device), out, numel, len(payloads), norms.stride(0),
        packed.stride(0), SIZE=form.bucket_size, TILE=tile, BITS=form.bits, enable_fp_fusion=False,
    )  # fmt: skip


def _tile(form: NUQFormat) -> int:
    return min(_TILE, int(triton.next_power_of_2(form.bucket_size)))
