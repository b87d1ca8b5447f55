"""The reference of the gradient codec: plain torch, any device, one readable expression per rule.

Implements the quantizer of NUQSGD (Ramezani-Kebrya et al., JMLR 22(114), 2021, arXiv 1908.06077, section 3)
on the format of `lightning_n2uq.ops.formats.gradient_codec`. The kernels of the other backends give the
same bytes. Rules that must not be tidied, because bytes depend on them:

- The l2 norm is the square root of an exact integer sum. Each magnitude becomes a 24-bit integer in units of
  `2**-23` of the bucket's largest power of two (low bits truncated); squares are summed in int64, so the
  order of summation does not matter and magnitudes from 1e-45 to 3e38 neither under- nor overflow. Only
  `sqrt` (fp64) and the final rounding to fp32 round. The largest entry is exact, hence `norm >= max|v|`
  and `r <= 1`, always. Truncation lowers the norm by less than 1e-5 relative, which biases nothing: the
  same norm decodes.
- `r = |v| / norm` is an IEEE fp32 division.
- `float` family: the top `23 - m` of the random bits are added to the bit pattern of `r`, then the mantissa
  is cut to `m` bits. Below the lowest level `l`: up if `random >> 1 < trunc(r / l * 2**31)`.
- `uniform` and `table`: up if `(random >> 8) * 2**-24` is less than the distance from the lower level in
  units of the gap.
- A bucket with a NaN or an infinity has the norm 0x7FC00000 (NaN) and codes 0. Finite entries whose norm
  exceeds fp32 (above 3.4e38) have the norm infinity and codes 0. Both decode to NaN everywhere.
"""

import math

import torch
from torch import Tensor

from lightning_n2uq.ops.backends.common.rng import random_bits
from lightning_n2uq.ops.formats.gradient_codec import NUQFormat

_INF_BITS = 0x7F800000
_SIGN_CLEAR = 0x7FFFFFFF


def encode(x: Tensor, form: NUQFormat, seed: int, out: Tensor) -> None:
    """Encodes `x` into `out`; see `lightning_n2uq.ops.gradient_codec.nuq_encode`."""
    random = random_bits(seed, form.num_buckets(x.numel()), form.bucket_size, x.device)
    out.copy_(encoded(x, form, random))


def encoded(x: Tensor, form: NUQFormat, random: Tensor) -> Tensor:
    """Returns the message of a gradient, 1-D uint8 of `form.nbytes(x.numel())` bytes.

    Args:
        x: The gradient, 1-D fp32.
        form: The message format.
        random: Random words in `0 .. 2**32 - 1`, int64 `[num_buckets, bucket_size]`.
    """
    buckets = _to_buckets(x, form.bucket_size)
    norms = bucket_norms(buckets, form.norm)
    usable = torch.isfinite(norms) & (norms > 0)
    ratio = buckets.abs() / torch.where(usable, norms, 1.0).unsqueeze(1)
    magnitude = _round(torch.where(usable.unsqueeze(1), ratio, 0.0), random, form)
    negative = (buckets < 0) & (magnitude > 0)
    codes = magnitude + (negative.long() << (form.bits - 1))
    packed = pack(codes.reshape(-1)[: x.numel()], form.bits)
    return torch.cat([norms.view(torch.uint8), packed])


def decode_mean(payloads: Tensor, form: NUQFormat, numel: int, out: Tensor) -> None:
    """Decodes and averages messages into `out`; see `lightning_n2uq.ops.gradient_codec.nuq_decode_mean`."""
    total = decoded(payloads[0], form, numel)
    for payload in payloads[1:]:
        total += decoded(payload, form, numel)
    out.copy_(total / len(payloads))


def decoded(payload: Tensor, form: NUQFormat, numel: int) -> Tensor:
    """Returns the gradient `[numel]`, fp32, of one message `[form.nbytes(numel)]`, uint8."""
    start = form.norm_bytes(numel)
    norms = payload[:start].clone().view(torch.float32)
    norms = torch.where(torch.isfinite(norms), norms, math.nan)
    codes = unpack(payload[start:], form.bits, numel)
    units = form.signed_levels().to(payload.device)[codes]
    return units * norms.repeat_interleave(form.bucket_size)[:numel]


def bucket_norms(buckets: Tensor, norm: str) -> Tensor:
    """Returns the norms of an fp32 matrix's rows, as defined above: fp32 `[rows]`."""
    bits = buckets.view(torch.int32) & _SIGN_CLEAR
    largest = bits.amax(dim=1) if len(bits) else bits.new_zeros(0)
    finite = largest < _INF_BITS
    norms = largest.view(torch.float32) if norm == "linf" else _l2_norms(bits, largest)
    return torch.where(finite, norms, math.nan)


def _l2_norms(bits: Tensor, largest: Tensor) -> Tensor:
    whole, unit = whole_magnitudes(bits, largest)
    return ((whole * whole).sum(dim=1).double().sqrt() * unit).float()


def whole_magnitudes(bits: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Returns magnitudes as 24-bit integers, and what one stands for, per row.

    Args:
        bits: The magnitudes' bit patterns, int32 `[rows, size]`.
        largest: The largest of every row.

    Returns:
        int64 `[rows, size]`, low bits truncated, and fp64 `[rows]`.
    """
    exponent = (bits >> 23).clamp(min=1)
    top = (largest >> 23).clamp(min=1)
    mantissa = (bits & 0x7FFFFF) | ((bits >= 0x800000).int() << 23)
    whole = (mantissa >> (top.unsqueeze(1) - exponent).clamp(0, 31)).long()
    return whole, ((top - 150).long() + 1023 << 52).view(torch.float64)  # 2**(top - 150), exact


def _round(ratio: Tensor, random: Tensor, form: NUQFormat) -> Tensor:
    """Rounds stochastically fp32 ratios in 0..1 to magnitude codes (int64)."""
    if form.family == "float":
        return _round_float(ratio, random, form)
    uniform01 = (random >> 8).float() * 2.0**-24
    if form.family == "uniform":
        scaled = ratio * form.top
        lower = scaled.long()
        return lower + (uniform01 < scaled - lower)
    levels = torch.tensor(form.levels, dtype=torch.float32, device=ratio.device)
    lower = (torch.bucketize(ratio, levels, right=True) - 1).clamp(max=form.top - 1)
    gap = levels[lower + 1] - levels[lower]
    return lower + (uniform01 < (ratio - levels[lower]) / gap)


def _round_float(ratio: Tensor, random: Tensor, form: NUQFormat) -> Tensor:
    lowest = form.levels[1]
    shift = 23 - form.mantissa_bits
    bits = ratio.view(torch.int32).long()
    code = ((bits + (random >> (32 - shift))) >> shift) - form.code_offset
    share = (ratio * form.inverse_lowest).clamp(max=0.99999994) * 2.0**31
    return torch.where(ratio < lowest, ((random >> 1) < share.long()).long(), code)


def _to_buckets(x: Tensor, bucket_size: int) -> Tensor:
    rows = -(-x.numel() // bucket_size)
    padded = torch.nn.functional.pad(x, (0, rows * bucket_size - x.numel()))
    return padded.view(rows, bucket_size)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs int64 codes `[n]` below `2**bits` into uint8 `[ceil(n * bits / 8)]`, least significant first."""
    groups = torch.nn.functional.pad(codes, (0, -len(codes) % 8)).view(-1, 8)
    shifts = torch.arange(8, device=codes.device) * bits
    words = (groups << shifts).sum(dim=1, keepdim=True)
    offsets = torch.arange(bits, device=codes.device) * 8
    packed = ((words >> offsets) & 0xFF).to(torch.uint8)
    return packed.view(-1)[: -(-len(codes) * bits // 8)]


def unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    """Unpacks what `pack` has packed: int64 codes `[numel]` of uint8 `[ceil(numel * bits / 8)]`."""
    groups = torch.nn.functional.pad(packed.long(), (0, -len(packed) % bits)).view(-1, bits)
    offsets = torch.arange(bits, device=packed.device) * 8
    words = (groups << offsets).sum(dim=1, keepdim=True)
    shifts = torch.arange(8, device=packed.device) * bits
    return ((words >> shifts) & ((1 << bits) - 1)).view(-1)[:numel]
