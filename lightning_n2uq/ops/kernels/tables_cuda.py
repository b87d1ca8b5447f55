# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton: tables and parameter gradients of the threshold quantizer, one launch each.

Plain torch needs twenty launches for either, each of them longer than its arithmetic. Every lane makes one
entry of a table and adds up the widths before it one after the other in float64, as `host_tables` does, so
that CPU and CUDA have the same tables.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_n2uq.ops.kernels.product_cuda import product
from lightning_n2uq.ops.tables import OUTPUT_RANGE, WIDTH_FLOOR, ThresholdTables

_FLOOR, _RANGE = tl.constexpr(WIDTH_FLOOR), tl.constexpr(OUTPUT_RANGE)
ROWS = ("scale_in", "knots", "thresholds", "slopes", "ramp_starts", "ramp_slopes", "levels", "outputs")


@triton.jit
def _floored(raw):
    return tl.where(raw <= _FLOOR, _FLOOR, raw)


@triton.jit
def _knots(start_ptr, widths_ptr, lane, N: tl.constexpr):
    """`t_lane`, added up in order; beyond `t_N` it stays `t_N`."""
    knot = tl.zeros(lane.shape, tl.float64) + tl.load(start_ptr).to(tl.float64)
    for k in range(N):
        width = _floored(tl.load(widths_ptr + k).to(tl.float64))
        knot = tl.where(lane > k, knot + width, knot)
    return knot


@triton.jit(do_not_specialize=["ramp_bits"])
def _tables_kernel(
    start_ptr, widths_ptr, alpha_ptr, beta_ptr, out_ptr, ramp_bits, N: tl.constexpr, LANES: tl.constexpr
) -> None:
    """The fields of `ThresholdTables`, one per row of `N + 2` numbers in the order of `ROWS`.

    The first row holds both scales.
    """
    PITCH: tl.constexpr = N + 2
    number = out_ptr.dtype.element_ty
    lane = tl.arange(0, LANES)
    knot = _knots(start_ptr, widths_ptr, lane, N)
    width = _floored(tl.load(widths_ptr + lane, mask=lane < N, other=1.0).to(tl.float64))
    before = _floored(tl.load(widths_ptr + lane - 1, mask=(lane > 0) & (lane <= N), other=1.0).to(tl.float64))
    alpha, beta = tl.load(alpha_ptr).to(tl.float64), tl.load(beta_ptr).to(tl.float64)
    ramp = ramp_bits.to(tl.int64).to(tl.float64, bitcast=True)
    step = tl.full([], _RANGE, tl.float64) / N
    rises = (lane > 0) & (lane <= N)
    slope = tl.where(rises, 1.0 / before * step, 0.0)
    level = lane * step
    share = (1.0 - ramp) / 2
    ramp_start = knot + product(width, tl.zeros_like(width) + share)
    ramp_slope = tl.where(ramp > 0, 1.0 / (ramp * width), 0.0)
    tl.store(out_ptr, alpha.to(number))
    tl.store(out_ptr + 1, beta.to(number))
    tl.store(out_ptr + PITCH + lane, knot.to(number), mask=lane <= N)
    tl.store(out_ptr + 2 * PITCH + lane, (knot + width / 2).to(number), mask=lane < N)
    tl.store(out_ptr + 3 * PITCH + lane, slope.to(number), mask=lane < PITCH)
    tl.store(out_ptr + 4 * PITCH + lane, ramp_start.to(number), mask=lane < N)
    tl.store(out_ptr + 5 * PITCH + lane, ramp_slope.to(number), mask=lane < N)
    tl.store(out_ptr + 6 * PITCH + lane, level.to(number), mask=lane <= N)
    tl.store(out_ptr + 7 * PITCH + lane, (level * beta).to(number), mask=lane <= N)


@triton.jit
def _gradients_kernel(
    sums_ptr, start_ptr, widths_ptr, alpha_ptr, beta_ptr, d_start_ptr, d_widths_ptr, d_alpha_ptr, d_beta_ptr,
    N: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """`threshold.parameter_gradients`, in float64; lane `k` has the width `k`, whose segment is `k + 1`."""
    lane = tl.arange(0, LANES)
    known = lane < N
    raw = tl.load(widths_ptr + lane, mask=known, other=1.0).to(tl.float64)
    alpha, beta = tl.load(alpha_ptr).to(tl.float64), tl.load(beta_ptr).to(tl.float64)
    grad_sum = tl.load(sums_ptr + 2 * lane + 2, mask=known, other=0.0)
    grad_x_sum = tl.load(sums_ptr + 2 * lane + 3, mask=known, other=0.0)
    value = tl.load(sums_ptr)
    visible = value - value  # NaN or infinity anywhere reaches every parameter
    step = tl.full([], _RANGE, tl.float64) / N
    slope = step / _floored(raw)
    pull = tl.where(known, slope * grad_sum + visible, 0.0)
    pulls = tl.sum(pull, axis=0)
    right = pulls - tl.cumsum(pull, axis=0)
    climbed = alpha * grad_x_sum - _knots(start_ptr, widths_ptr, lane, N) * grad_sum
    d_width = -beta * (right + slope * slope / step * climbed)
    d_width = tl.where(raw <= _FLOOR, 0.0, d_width)
    d_alpha = tl.sum(tl.where(known, slope * grad_x_sum + visible, 0.0), axis=0)
    tl.store(d_widths_ptr + lane, d_width.to(d_widths_ptr.dtype.element_ty), mask=known)
    tl.store(d_start_ptr, (-beta * pulls).to(d_start_ptr.dtype.element_ty))
    tl.store(d_alpha_ptr, (beta * d_alpha).to(d_alpha_ptr.dtype.element_ty))
    tl.store(d_beta_ptr, value.to(d_beta_ptr.dtype.element_ty))


def table_rows(
    start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor, dtype: torch.dtype, ramp: float = 0.0
) -> Tensor:
    """The tables as rows `[8, n + 2]`; see `ROWS`. Some rows are shorter, the first holds both scales."""
    n = widths.numel()
    out = torch.empty(8, n + 2, dtype=dtype, device=widths.device)
    (ramp_bits,) = struct.unpack("<q", struct.pack("<d", ramp))  # a plain float would travel as float32
    _tables_kernel[(1,)](
        *(p.detach().contiguous() for p in (start, widths, scale_in, scale_out)),
        out,
        ramp_bits,
        N=n,
        LANES=int(triton.next_power_of_2(n + 2)),
    )
    return out


def tables(
    start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor, dtype: torch.dtype, ramp: float
) -> ThresholdTables:
    """`tables.threshold_tables` in one launch, as views of one buffer."""
    n = widths.numel()
    out = table_rows(start, widths, scale_in, scale_out, dtype, ramp)
    lengths = (n + 1, n, n + 2, n, n, n + 1, n + 1)
    return ThresholdTables(out[0, 0], *(out[row, :length] for row, length in enumerate(lengths, 1)))


def parameter_gradients(
    sums: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`threshold.parameter_gradients` in one launch.

    Args:
        sums: `[n + 2, 2]` float64, contiguous; the first place holds the sum of `g value`.
        start: 1 element.
        widths: `[n]`.
        scale_in: 1 element.
        scale_out: 1 element.
    """
    parameters = [p.detach().contiguous() for p in (start, widths, scale_in, scale_out)]
    grads = [torch.empty_like(p) for p in parameters]
    n = widths.numel()
    lanes = int(triton.next_power_of_2(n))
    _gradients_kernel[(1,)](sums, *parameters, *grads, N=n, LANES=lanes)
    return grads[0], grads[1], grads[2], grads[3]
