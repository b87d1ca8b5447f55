"""The fused chain (norm, bias, PReLU, bias, quantizer) and its packed codes in plain torch: the reference.

Rules that must not be tidied: the norm is one product and one sum, rounded each; a pre-activation of zero
takes PReLU's negative side, as in torch; the layout of the codes is the kernels' (`numba.code_loops`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_n2uq.ops import reference
from lightning_n2uq.ops.backends.common.plane_operators import PlaneActivation
from lightning_n2uq.ops.backends.common.planes import (
    PlaneNorm,
    codes_for_backward,
    empty_map,
    empty_rebuilt,
    has_nan,
    ordered,
    packed_bytes,
    packed_shape,
)
from lightning_n2uq.ops.backends.common.rows import units
from lightning_n2uq.ops.formats.fused_activation import PReLUParameters
from lightning_n2uq.ops.tables import ThresholdTables

__all__ = [
    "backward",
    "codes_for_backward",
    "empty_map",
    "empty_rebuilt",
    "forward",
    "has_nan",
    "ordered",
    "packed_shape",
    "rebuild",
]

MOST_BITS = 0  # the fused path is not taken: it would be slower than the plain one


def as_planes(x: Tensor) -> Tensor:
    """Returns planes as they are, rows `[R, C]` as the planes `[1, C, R]` float32 of one image."""
    return x.float().t()[None] if x.dim() == 2 else x


def in_form_of(y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Undoes `as_planes` for a result `y` of `x`."""
    return y[0].t().to(dtype).contiguous() if x.dim() == 2 else y


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and biased variance of every channel of planes or rows, `[C]` float64."""
    variance, mean = torch.var_mean(as_planes(x).double(), (0, 2), correction=0)
    return mean, variance


def chain(x: Tensor, norm: PlaneNorm | None, act: PReLUParameters | None) -> tuple[Tensor, Tensor]:
    """Returns what PReLU sees, and what the quantizer sees: `[N, C, P]` each."""
    u = x if norm is None else x * norm.scale[:, None] + norm.shift[:, None]
    if act is None:
        return u, u
    bias_in, slope, bias_out = (value.detach().to(x.dtype)[:, None] for value in act)
    u = u + bias_in
    return u, torch.where(u > 0, u, slope * u) + bias_out


def quantize(
    x: Tensor,
    norm: PlaneNorm | None,
    act: PReLUParameters | None,
    tables: ThresholdTables,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns the quantized chain in `dtype` (uint8: codes, 0 for NaN; planes: float32), packed codes."""
    _, v = chain(as_planes(x), norm, act)
    scaled = v * tables.scale_in
    codes = reference.threshold_codes(scaled, tables.thresholds)
    if dtype == torch.uint8:
        y = codes.to(dtype)
    else:
        y = torch.where(scaled.isnan(), scaled, tables.outputs[codes.long()])
    packing = pack_rows if x.dim() == 2 else pack
    return in_form_of(y, x, dtype), packing(codes, scaled.isnan(), tables.thresholds.numel().bit_length())


def pack_rows(codes: Tensor, nan: Tensor, bits: int) -> Tensor:
    """Returns `[units, bytes]` uint8, every unit of `common.rows` packed as a plane; `[1, C, R]` codes."""
    channels = codes.shape[1]
    form = units(channels)
    number = form.number(codes.numel()) // form.parts

    def by_unit(values: Tensor) -> Tensor:
        flat = values[0].t().reshape(-1)
        flat = F.pad(flat, (0, number * form.period - flat.numel())).reshape(number, form.period)
        flat = F.pad(flat, (0, form.parts * form.size - form.period))
        return flat.reshape(1, number * form.parts, form.size)

    return pack(by_unit(codes), by_unit(nan), bits)[0]


def pack(codes: Tensor, nan: Tensor, bits: int) -> Tensor:
    """Returns the bit planes of `[N, C, P]` codes and the flag of every plane: `[N, C, bytes]` uint8."""
    has_nan = nan.any(2)
    pixels = codes.shape[2]
    row = -(-pixels // 8)
    codes = torch.nn.functional.pad(codes.int(), (0, 8 * row - pixels)).reshape(*codes.shape[:2], 8, row)
    shift = torch.arange(8, dtype=torch.int32, device=codes.device)[:, None]
    rows = [(((codes >> bit) & 1) << shift).sum(2) for bit in range(bits)]
    return torch.cat([*rows, has_nan[:, :, None]], 2).to(torch.uint8)


def unpack(packed: Tensor, outputs: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns the quantized chain of a map of that size; `outputs` is the table `[n + 1]`."""
    if packed.dim() == 3:
        return unpack_planes(packed, outputs, math.prod(size[2:]))
    form = units(size[1])
    y = unpack_planes(packed[None], outputs, form.size)
    y = y.reshape(-1, form.parts * form.size)[:, : form.period].reshape(-1)
    return y[: math.prod(size)].reshape(-1, size[1]).to(dtype)


def unpack_planes(packed: Tensor, outputs: Tensor, pixels: int) -> Tensor:
    """Returns the quantized chain `[N, C, P]` from its packed codes."""
    bits = (outputs.numel() - 1).bit_length()
    if packed.shape[2] != packed_bytes(pixels, bits):
        raise ValueError(
            f"packed: got {packed.shape[2]} bytes per plane, needed {packed_bytes(pixels, bits)}"
        )
    row = -(-pixels // 8)
    rows = packed[:, :, :-1].int().reshape(*packed.shape[:2], bits, 1, row)
    shift = torch.arange(8, dtype=torch.int32, device=packed.device)[:, None]
    weight = torch.arange(bits, dtype=torch.int32, device=packed.device)[:, None, None]
    codes = (((rows >> shift) & 1) << weight).sum(2).flatten(2)[:, :, :pixels]
    return torch.where(packed[:, :, -1:] > 0, torch.nan, outputs[codes.long()])


def gradient(
    grad: Tensor,
    x: Tensor,
    norm: PlaneNorm | None,
    act: PReLUParameters | None,
    tables: ThresholdTables,
    scale_out: Tensor,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Returns the input gradient, sums `[C, 4]`, and the quantizer's segment sums.

    The columns of the sums: gradients of the first bias (which is the norm's shift's), of the slope, of the
    second bias, and `sum d (x - mean)`.
    """
    upstream, source = as_planes(grad), as_planes(x)
    u, v = chain(source, norm, act)
    segments = reference.threshold_segment_sums(upstream, v, tables)
    d = reference.threshold_input_gradient(upstream, v, tables, scale_out)
    d, sums = activation_gradient(d, u, source, norm, act)
    dx = d if norm is None else norm_gradient(d, source, norm, sums)
    return in_form_of(dx, x, x.dtype), sums, segments


def activation_gradient(
    d: Tensor, u: Tensor, x: Tensor, norm: PlaneNorm | None, act: PReLUParameters | None
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of the activation's input, and the sums of `gradient`."""
    bias_out, inner, slope_terms = d, d, torch.zeros_like(d)
    if act is not None:
        inner = torch.where(u > 0, d, d * act.slope.detach().to(d.dtype)[:, None])
        slope_terms = torch.where(u > 0, torch.zeros_like(d), d * u)
    mean = torch.zeros_like(x[0, :, :1]) if norm is None else norm.mean[:, None]
    product = inner.double() * (x.double() - mean.double())
    terms = (inner.double(), slope_terms.double(), bias_out.double(), product)
    return inner, torch.stack([term.sum((0, 2)) for term in terms], 1)


def norm_gradient(d: Tensor, x: Tensor, norm: PlaneNorm, sums: Tensor) -> Tensor:
    """Returns the gradient of the norm's input from that of its output."""
    number = x.shape[0] * x.shape[2]
    offset = (sums[:, 0] / number).to(d.dtype)[:, None]
    tilt = (sums[:, 3] * norm.inverse.double() * norm.inverse.double() / number).to(d.dtype)[:, None]
    return (d - offset - (x - norm.mean[:, None]) * tilt) * norm.scale[:, None]


_PLANES = PlaneActivation(statistics, quantize, gradient, unpack)
forward, backward, rebuild = _PLANES.forward, _PLANES.backward, _PLANES.rebuild
