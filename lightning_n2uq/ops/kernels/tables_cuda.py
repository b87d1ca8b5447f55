# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton: tables and parameter gradients of the threshold quantizer, one launch each.

Plain torch needs twenty launches for either, each of them longer than its arithmetic. One program walks the
few steps one after the other in float64, as `host_tables` does, so that CPU and CUDA have the same tables.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_n2uq.ops.tables import OUTPUT_RANGE, WIDTH_FLOOR, ThresholdTables

_FLOOR, _RANGE = tl.constexpr(WIDTH_FLOOR), tl.constexpr(OUTPUT_RANGE)


@triton.jit
def _width(widths_ptr, k):
    raw = tl.load(widths_ptr + k).to(tl.float64)
    return tl.where(raw <= _FLOOR, _FLOOR, raw)


@triton.jit(do_not_specialize=["ramp_bits"])
def _tables_kernel(start_ptr, widths_ptr, alpha_ptr, beta_ptr, out_ptr, n, pitch, ramp_bits) -> None:
    """The fields of `ThresholdTables`, one per row of `pitch` numbers; see `host_tables`."""
    number = out_ptr.dtype.element_ty
    knot = tl.load(start_ptr).to(tl.float64)
    alpha, beta = tl.load(alpha_ptr).to(tl.float64), tl.load(beta_ptr).to(tl.float64)
    ramp = ramp_bits.to(tl.int64).to(tl.float64, bitcast=True)
    step = tl.full([], _RANGE, tl.float64) / n
    flat = tl.zeros([], number)
    tl.store(out_ptr, alpha.to(number))
    tl.store(out_ptr + pitch, knot.to(number))
    tl.store(out_ptr + 3 * pitch, flat)
    tl.store(out_ptr + 3 * pitch + n + 1, flat)
    tl.store(out_ptr + 6 * pitch, flat)
    tl.store(out_ptr + 7 * pitch, (beta * 0.0).to(number))
    for k in range(n):
        width = _width(widths_ptr, k)
        level = step * (k + 1)
        tl.store(out_ptr + 2 * pitch + k, (knot + width / 2).to(number))
        tl.store(out_ptr + 3 * pitch + k + 1, (1.0 / width * step).to(number))
        tl.store(out_ptr + 4 * pitch + k, (knot + width * ((1.0 - ramp) / 2)).to(number))
        tl.store(out_ptr + 5 * pitch + k, tl.where(ramp > 0, 1.0 / (ramp * width), 0.0).to(number))
        tl.store(out_ptr + 6 * pitch + k + 1, level.to(number))
        tl.store(out_ptr + 7 * pitch + k + 1, (level * beta).to(number))
        knot += width
        tl.store(out_ptr + pitch + k + 1, knot.to(number))


@triton.jit
def _gradients_kernel(
    sums_ptr,
    value_ptr,
    start_ptr,
    widths_ptr,
    alpha_ptr,
    beta_ptr,
    d_start_ptr,
    d_widths_ptr,
    d_alpha_ptr,
    d_beta_ptr,
    n,
) -> None:
    """`threshold.parameter_gradients`, in float64."""
    alpha, beta = tl.load(alpha_ptr).to(tl.float64), tl.load(beta_ptr).to(tl.float64)
    value = tl.load(value_ptr)
    visible = value - value  # NaN or infinity anywhere reaches every parameter
    step = tl.full([], _RANGE, tl.float64) / n
    pulls, d_alpha = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    for k in range(n):
        slope = step / _width(widths_ptr, k)
        pulls += slope * tl.load(sums_ptr + 2 * k + 2) + visible
        d_alpha += slope * tl.load(sums_ptr + 2 * k + 3) + visible
    knot, right = tl.load(start_ptr).to(tl.float64), pulls
    for k in range(n):
        width = _width(widths_ptr, k)
        slope = step / width
        grad_sum, grad_x_sum = tl.load(sums_ptr + 2 * k + 2), tl.load(sums_ptr + 2 * k + 3)
        right -= slope * grad_sum + visible
        climbed = alpha * grad_x_sum - knot * grad_sum
        d_width = -beta * (right + slope * slope / step * climbed)
        learns = tl.load(widths_ptr + k).to(tl.float64) > _FLOOR
        d_width = tl.where(learns | (width != width), d_width, 0.0)
        tl.store(d_widths_ptr + k, d_width.to(d_widths_ptr.dtype.element_ty))
        knot += width
    tl.store(d_start_ptr, (-beta * pulls).to(d_start_ptr.dtype.element_ty))
    tl.store(d_alpha_ptr, (beta * d_alpha).to(d_alpha_ptr.dtype.element_ty))
    tl.store(d_beta_ptr, value.to(d_beta_ptr.dtype.element_ty))


def tables(
    start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor, dtype: torch.dtype, ramp: float
) -> ThresholdTables:
    """`tables.threshold_tables` in one launch, as views of one buffer."""
    n = widths.numel()
    out = torch.empty(8, n + 2, dtype=dtype, device=widths.device)
    (ramp_bits,) = struct.unpack("<q", struct.pack("<d", ramp))  # a plain float would travel as float32
    _tables_kernel[(1,)](
        start.detach(),
        widths.detach().contiguous(),
        scale_in.detach(),
        scale_out.detach(),
        out,
        n,
        n + 2,
        ramp_bits,
        enable_fp_fusion=False,
        num_warps=1,
    )
    lengths = (n + 1, n, n + 2, n, n, n + 1, n + 1)
    return ThresholdTables(out[0, 0], *(out[row, :length] for row, length in enumerate(lengths, 1)))


def parameter_gradients(
    sums: Tensor, value_sum: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`threshold.parameter_gradients` in one launch; `sums` is contiguous."""
    parameters = [p.detach().contiguous() for p in (start, widths, scale_in, scale_out)]
    grads = [torch.empty_like(p) for p in parameters]
    _gradients_kernel[(1,)](
        sums, value_sum, *parameters, *grads, widths.numel(), enable_fp_fusion=False, num_warps=1
    )
    return grads[0], grads[1], grads[2], grads[3]
