"""The reference of the rotated codec: plain torch, any device, one readable expression per rule.

Randomized Hadamard rotation and nearest levels with EDEN's scale (Vargaftik et al., ICML 2022, arXiv
2108.08842; DRIVE, NeurIPS 2021, arXiv 2105.08339, is its 1 bit), or unbiased stochastic rounding in the
rotated domain. The format is that of `lightning_n2uq.ops.formats.rotated_codec`. The kernels of the other
backends give the same bytes. Rules that must not be tidied, because bytes depend on them:

- A bucket is multiplied by the power of two that brings its largest magnitude into 1..2, so that sums neither
  under- nor overflow: by two powers one after the other, since one may be outside fp32's range.
- The transform is `log2(d)` sweeps of fp32 sums and differences over the bits of the index, lowest bit first.
- `stochastic`: a group's scale is its bucket's largest magnitude times `byte / 255`, the smallest byte that
  covers the group's own largest. `r = |u| / scale` is an fp32 division. With `t` the middle of one of 2**20
  equal parts of 0..1, `r` goes above as many levels as `r > level + t * gap` holds for. Below the lowest
  level `l` the sign changes unless `r > t * 2l - l`. A number on a level stays there.
- `eden`: the norm of `u` and its product with the levels are exact sums of integers (as in `gradient_codec`);
  `scale = ||u||^2 / <u, level>` is one fp64 division.
- Decoding multiplies all scales of a bucket by the power of two that brings the largest into 1..2. Where all
  messages have the same key, levels are summed in the order given and rotated back once; otherwise every
  message is rotated back before it is added. The division by their number comes next, powers of two last.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_n2uq.ops.backends.common.rng import random_bits, words_of_key
from lightning_n2uq.ops.backends.reference.gradient_codec import bucket_norms, pack, unpack, whole_magnitudes
from lightning_n2uq.ops.formats.rotated_codec import KEY_BYTES, RotatedFormat
from lightning_n2uq.ops.gaussian_levels import NEAREST_UNIT

_INF_BITS = 0x7F800000
_NAN_BITS = 0x7FC00000
_SIGN_CLEAR = 0x7FFFFFFF


def encode(x: Tensor, form: RotatedFormat, seed: int, out: Tensor) -> None:
    """Encodes `x` into `out`; see `lightning_n2uq.ops.gradient_codec.rotated_encode`."""
    key, numel = form.key(seed), x.numel()
    whole, rest = form.sizes(numel)
    parts = []
    for first, count, size in ((0, whole, form.bucket_size), (whole, int(rest > 0), rest)):
        if count:
            start = first * form.bucket_size
            piece = x[start : start + count * size]
            rows = torch.nn.functional.pad(piece, (0, count * size - piece.numel())).view(count, size)
            random = random_bits(seed, count, size, x.device, first) if form.stochastic else None
            parts.append(_encode_rows(rows, form, flips(key, first, count, size, x.device), random))
    scales, groups, codes = (torch.cat(column) for column in zip(*parts, strict=True))
    header = torch.tensor(key, dtype=torch.int64, device=x.device).to(torch.uint32).view(torch.uint8)
    out.copy_(torch.cat([header, scales.view(torch.uint8), groups, pack(codes, form.bits)]))


def decode_mean(payloads: Tensor, form: RotatedFormat, numel: int, out: Tensor) -> None:
    """Decodes and averages into `out`; see `lightning_n2uq.ops.gradient_codec.rotated_decode_mean`."""
    whole, rest = form.sizes(numel)
    for first, count, size in ((0, whole, form.bucket_size), (whole, int(rest > 0), rest)):
        if count:
            start = first * form.bucket_size
            rows = _decode_rows(payloads, form, numel, (first, count, size))
            target = out[start : start + count * size]
            target.copy_(rows.view(-1)[: target.numel()])


def hadamard(rows: Tensor) -> Tensor:
    """Returns the Walsh-Hadamard transform of every row, not normalised: fp32 `[rows, size]`."""
    count, size = rows.shape
    step = 1
    while step < size:
        pairs = rows.view(count, size // (2 * step), 2, step)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        rows = torch.stack([low + high, low - high], dim=2).view(count, size)
        step *= 2
    return rows


def flips(key: tuple[int, int], first: int, count: int, size: int, device: torch.device) -> Tensor:
    """Returns a matrix of 1 and -1, fp32 `[count, size]`: the signs of `D` for buckets from `first` on."""
    words = words_of_key(key, first, count, -(-size // 32), device)
    bits = words.unsqueeze(2) >> torch.arange(32, device=device) & 1
    return 1.0 - 2.0 * bits.view(count, -1)[:, :size].float()


def _encode_rows(
    rows: Tensor, form: RotatedFormat, signs: Tensor, random: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns fp32 scales `[rows]`, group bytes and int64 codes of equally large buckets."""
    largest = (rows.view(torch.int32) & _SIGN_CLEAR).amax(dim=1)
    usable = (largest > 0) & (largest < _INF_BITS)
    exponent = 127 - (largest >> 23).clamp(1, 254).long()  # of the power of two that is multiplied by
    safe = torch.where(usable.unsqueeze(1), rows, 0.0)
    rotated = hadamard(_times_power(safe, exponent.unsqueeze(1)) * signs)
    if random is None:
        scale, codes = _nearest(rotated, form)
        groups = codes.new_zeros(0, dtype=torch.uint8)
    else:
        scale, shares, codes = _stochastic(rotated, form, random)
        groups = torch.where(usable.unsqueeze(1), shares, 0).to(torch.uint8).view(-1)
    half = _log2(rows.shape[1]) // 2
    scales = (scale * _double_power(-exponent - half)).float()
    scales = torch.where(usable, scales, torch.where(largest == 0, 0.0, math.nan))
    return scales, groups, torch.where(usable.unsqueeze(1), codes, 0).view(-1)


def _stochastic(rotated: Tensor, form: RotatedFormat, random: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the largest magnitudes (fp64), the groups' bytes and the codes."""
    count, size = rotated.shape
    grouped = rotated.abs().view(count, form.num_groups(size), -1)
    largest = grouped.amax(dim=2)
    top = largest.amax(dim=1, keepdim=True)
    share = (largest / torch.where(top > 0, top, 1.0) * 255.0).ceil().long()
    scale = top * share_of_byte(share)
    ratio = (grouped / torch.where(scale > 0, scale, 1.0).unsqueeze(2)).view(count, size)
    t = (((random >> 12) << 1) + 1).float() * 2.0**-21
    magnitude = torch.zeros_like(random)
    for low, high in zip(form.levels, form.levels[1:], strict=False):
        magnitude += ratio > low + t * (high - low)
    lowest = form.levels[0]
    kept = ratio > t * (2 * lowest) - lowest
    negative = (rotated.view(torch.int32) < 0) == kept
    return top.squeeze(1).double(), share, magnitude + (negative.long() << (form.bits - 1))


def share_of_byte(byte: Tensor) -> Tensor:
    """Returns what part of its bucket's scale a group has, fp32."""
    return byte.float() / 255.0


def _nearest(rotated: Tensor, form: RotatedFormat) -> tuple[Tensor, Tensor]:
    """Returns EDEN's scales (fp64) and the codes."""
    size = rotated.shape[1]
    pattern = rotated.view(torch.int32) & _SIGN_CLEAR
    largest = pattern.amax(dim=1)
    whole, unit = whole_magnitudes(pattern, largest)
    norm = bucket_norms(rotated, "l2").unsqueeze(1)
    magnitude = torch.zeros(rotated.shape, dtype=torch.int64, device=rotated.device)
    for border in form.borders(size):
        magnitude += rotated.abs() > norm * torch.tensor(border, dtype=torch.float32)
    integers = torch.tensor([round(level / NEAREST_UNIT) for level in form.levels], device=rotated.device)
    product = (whole * integers[magnitude]).sum(dim=1)
    squares = (whole * whole).sum(dim=1)
    scale = squares.double() / NEAREST_UNIT / product.clamp(min=1).double() * unit
    negative = (rotated.view(torch.int32) < 0).long()
    return scale, magnitude + (negative << (form.bits - 1))


def _decode_rows(payloads: Tensor, form: RotatedFormat, numel: int, where: tuple[int, int, int]) -> Tensor:
    """Returns the mean of equally large buckets of all messages, fp32 `[count, size]`."""
    first, count, size = where
    scales = _scales(payloads, first, count)
    exponent = 127 - (scales.view(torch.int32).amax(dim=0) >> 23).clamp(1, 254).long()
    keys = _copied(payloads[:, :KEY_BYTES]).view(torch.int32).long() & 0xFFFFFFFF
    signs = [flips((int(lo), int(hi)), first, count, size, payloads.device) for lo, hi in keys.tolist()]
    rows = [
        _levels_of(payload, form, numel, where, _times_power(scale, exponent))
        for payload, scale in zip(payloads, scales, strict=True)
    ]
    if bool((keys == keys[0]).all()):
        mean = hadamard(_sum(rows)) * signs[0]
    else:
        mean = _sum([hadamard(row) * sign for row, sign in zip(rows, signs, strict=True)])
    mean = mean / len(rows) if len(rows) > 1 else mean
    back = _log2(size) // 2 - _log2(size) - exponent
    return _times_power(mean, back.unsqueeze(1))


def _scales(payloads: Tensor, first: int, count: int) -> Tensor:
    """Returns the scales of buckets of all messages, fp32 `[W, count]`, NaN where they are not finite."""
    start = KEY_BYTES + 4 * first
    scales = _copied(payloads[:, start : start + 4 * count]).view(torch.float32)
    return torch.where(torch.isfinite(scales) & (scales >= 0), scales, math.nan)


def _levels_of(
    payload: Tensor, form: RotatedFormat, numel: int, where: tuple[int, int, int], scale: Tensor
) -> Tensor:
    """Returns the rotated buckets of one message, fp32 `[count, size]`."""
    first, count, size = where
    start = form.codes_start(numel) + first * form.bucket_size * form.bits // 8
    codes = unpack(payload[start : start + count * size * form.bits // 8], form.bits, count * size)
    scale = scale.unsqueeze(1)
    if form.stochastic:
        groups = form.num_groups(size)
        start = form.groups_start(numel) + first * form.num_groups(form.bucket_size)
        bytes_ = payload[start : start + count * groups].view(count, groups)
        scale = scale * share_of_byte(bytes_)
    levels = torch.tensor(form.levels, dtype=torch.float32, device=payload.device)
    signed = torch.cat([levels, -levels])[codes].view(count, scale.shape[1], -1)
    return (signed * scale.unsqueeze(2)).view(count, size)


def _copied(columns: Tensor) -> Tensor:
    """Returns a copy that may be viewed as wider numbers; `contiguous` leaves a single row as it is."""
    return columns.clone(memory_format=torch.contiguous_format)


def _sum(rows: list[Tensor]) -> Tensor:
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


def _times_power(x: Tensor, exponent: Tensor) -> Tensor:
    """Returns `x * 2**exponent` by two fp32 products, the exponent from -252 to 254."""
    half = exponent >> 1
    return x * _power(half) * _power(exponent - half)


def _power(exponent: Tensor) -> Tensor:
    return (exponent + 127 << 23).int().view(torch.float32)


def _double_power(exponent: Tensor) -> Tensor:
    return (exponent + 1023 << 52).view(torch.float64)


def _log2(size: int) -> int:
    return size.bit_length() - 1
