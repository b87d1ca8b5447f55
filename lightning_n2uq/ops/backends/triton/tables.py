# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton: tables and parameter gradients of the threshold quantizer, one launch each.

Plain torch needs twenty launches for either, each of them longer than its arithmetic. Every lane makes one
entry of a table and adds up the widths before it one after the other in float64, as numpy does, so
that CPU and CUDA have the same tables.

A kernel adds up, in `CLIMBS` columns and one per width, all that the parameter gradients need: with `A` the
gradient times the surrogate's slope at an input, the sums of `g value`, of `A`, of `A x`, and for every width
`k` that of `A c_k`, `c_k` being the share of segment `k` that lies below the input, 0 to 1. The gradient of
width `k` is that last sum times `-beta`: widths wholly below an input move its knot by all they grow, the one
around it by the share that is below.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_n2uq.ops.backends.triton.product import FUSED, product
from lightning_n2uq.ops.tables import OUTPUT_RANGE, WIDTH_FLOOR, QuantizerParameters

CLIMBS = 3
_FLOOR, _RANGE, _CLIMBS = tl.constexpr(WIDTH_FLOOR), tl.constexpr(OUTPUT_RANGE), tl.constexpr(CLIMBS)
ROWS = ("scales", "knots", "thresholds", "outputs", "ramp_starts", "ramp_slopes", "inverses", "offsets")
KNOTS, THRESHOLDS, OUTPUTS, RAMP_STARTS, RAMP_SLOPES, INVERSES, OFFSETS = (
    tl.constexpr(row) for row in range(1, len(ROWS))
)
_RECORD_ROWS = 4  # n + 2 records of four numbers
BY_SEGMENT, BY_CODE = tl.constexpr(len(ROWS)), tl.constexpr(len(ROWS) + _RECORD_ROWS)
KNOT_RESTS = tl.constexpr(len(ROWS) + 2 * _RECORD_ROWS)  # behind the records, which begin at a multiple of 8
_SUMMED, _FEWEST_ROWS = 4096, 32  # numbers, and rows, that the summing program adds up at a time
_SUMMING_WARPS = 8


@triton.jit
def _floored(raw):
    return tl.where(raw <= _FLOOR, _FLOOR, raw)


@triton.jit
def _knots(start_ptr, widths_ptr, lane, N: tl.constexpr):
    """Returns `t_lane`, added up in order; beyond `t_N` it stays `t_N`."""
    knot = tl.zeros(lane.shape, tl.float64) + tl.load(start_ptr).to(tl.float64)
    for k in range(N):
        width = _floored(tl.load(widths_ptr + k).to(tl.float64))
        knot = tl.where(lane > k, knot + width, knot)
    return knot


@triton.jit
def _slope_below(widths_ptr, lane, step, N: tl.constexpr):
    """Returns the surrogate's slope on segment `lane`, from below; 0 on both flat ends."""
    rises = (lane > 0) & (lane <= N)
    width = _floored(tl.load(widths_ptr + lane - 1, mask=rises, other=1.0).to(tl.float64))
    return tl.where(rises, 1.0 / width * step, 0.0)


@triton.jit
def _store_records(records_ptr, first, second, third, fourth, index, mask) -> None:
    number = records_ptr.dtype.element_ty
    tl.store(records_ptr + 4 * index, first.to(number), mask=mask)
    tl.store(records_ptr + 4 * index + 1, second.to(number), mask=mask)
    tl.store(records_ptr + 4 * index + 2, third.to(number), mask=mask)
    tl.store(records_ptr + 4 * index + 3, fourth.to(number), mask=mask)


@triton.jit
def record(records_ptr, index):
    """Returns the four numbers of every record; float32 by two loads of 64 bits."""
    if records_ptr.dtype.element_ty == tl.float32:
        pairs_ptr = records_ptr.to(tl.pointer_type(tl.int64), bitcast=True) + 2 * index
        low, high = tl.load(pairs_ptr), tl.load(pairs_ptr + 1)
        first, second = low.to(tl.int32).to(tl.float32, bitcast=True), (low >> 32).to(tl.int32)
        third, fourth = high.to(tl.int32).to(tl.float32, bitcast=True), (high >> 32).to(tl.int32)
        second, fourth = second.to(tl.float32, bitcast=True), fourth.to(tl.float32, bitcast=True)
    else:
        first, second = tl.load(records_ptr + 4 * index), tl.load(records_ptr + 4 * index + 1)
        third, fourth = tl.load(records_ptr + 4 * index + 2), tl.load(records_ptr + 4 * index + 3)
    return first, second, third, fourth


@triton.jit(do_not_specialize=["ramp_bits"])
def _tables_kernel(
    start_ptr, widths_ptr, alpha_ptr, beta_ptr, out_ptr, ramp_bits, N: tl.constexpr, LANES: tl.constexpr
) -> None:
    """Writes what the kernels need of `ThresholdTables`, in rows of `N + 2` numbers, in `ROWS`' order.

    The first row holds both scales. `inverses` and `offsets` give the share of a segment below an input as
    `inverse * s + offset`, held to 0..1. Behind the rows come records of four numbers, four rows for those of
    every segment (threshold, slope, the levels below and above it; infinity where a flat end has none) and
    four for those of every code (the knot between its thresholds, the level, the slopes below and above it).
    The last row is what the knots have lost in rounding.
    """
    PITCH: tl.constexpr = N + 2
    number = out_ptr.dtype.element_ty
    lane = tl.arange(0, LANES)
    knot = _knots(start_ptr, widths_ptr, lane, N)
    width = _floored(tl.load(widths_ptr + lane, mask=lane < N, other=1.0).to(tl.float64))
    alpha, beta = tl.load(alpha_ptr).to(tl.float64), tl.load(beta_ptr).to(tl.float64)
    ramp = ramp_bits.to(tl.int64).to(tl.float64, bitcast=True)
    step = tl.full([], _RANGE, tl.float64) / N
    level = lane * step
    share = (1.0 - ramp) / 2
    ramp_start = knot + product(width, tl.zeros_like(width) + share)
    ramp_slope = tl.where(ramp > 0, 1.0 / (ramp * width), 0.0)
    inverse = (1.0 / width).to(number)
    tl.store(out_ptr, alpha.to(number))
    tl.store(out_ptr + 1, beta.to(number))
    threshold = knot + width / 2
    slope, slope_above = _slope_below(widths_ptr, lane, step, N), _slope_below(widths_ptr, lane + 1, step, N)
    tl.store(out_ptr + KNOTS * PITCH + lane, knot.to(number), mask=lane <= N)
    tl.store(out_ptr + THRESHOLDS * PITCH + lane, threshold.to(number), mask=lane < N)
    tl.store(out_ptr + RAMP_STARTS * PITCH + lane, ramp_start.to(number), mask=lane < N)
    tl.store(out_ptr + RAMP_SLOPES * PITCH + lane, ramp_slope.to(number), mask=lane < N)
    tl.store(out_ptr + OUTPUTS * PITCH + lane, (level * beta).to(number), mask=lane <= N)
    tl.store(out_ptr + INVERSES * PITCH + lane, inverse, mask=lane < N)
    offset = -knot * inverse.to(tl.float64)
    tl.store(out_ptr + OFFSETS * PITCH + lane, offset.to(number), mask=lane < N)
    rest = knot - knot.to(number).to(tl.float64)
    tl.store(out_ptr + KNOT_RESTS * PITCH + lane, rest.to(number), mask=lane <= N)
    _store_records(out_ptr + BY_CODE * PITCH, knot, level, slope, slope_above, lane, lane <= N)
    records_ptr, infinity = out_ptr + BY_SEGMENT * PITCH, tl.full(lane.shape, float("inf"), tl.float64)
    top, first = tl.zeros(lane.shape, tl.float64) + N * step, lane == 0  # a segment's threshold is the lane's
    _store_records(records_ptr, threshold, slope_above, level, (lane + 1) * step, lane + 1, lane < N)
    _store_records(records_ptr, infinity, 0 * top, 0 * top, top, lane, first)
    _store_records(records_ptr, infinity, 0 * top, top, top, lane + N + 1, first)


@triton.jit
def _column(sums, column, wanted):
    """Returns one of the sums, as a number."""
    return tl.sum(tl.where(column == wanted, sums, 0.0), axis=0)


@triton.jit(do_not_specialize=["programs"])
def _gradients_kernel(
    sums_ptr, programs, widths_ptr, beta_ptr, d_start_ptr, d_widths_ptr, d_alpha_ptr, d_beta_ptr,
    N: tl.constexpr, LANES: tl.constexpr, SUMMED: tl.constexpr,
) -> None:  # fmt: skip
    """Adds up the rows of `sums` in fixed order, and makes the gradients of the four parameters of them."""
    WIDTH: tl.constexpr = _CLIMBS + N
    column = tl.arange(0, LANES)
    parts = tl.zeros([SUMMED // LANES, LANES], tl.float64)
    for first in range(0, programs, SUMMED // LANES):
        row = first + tl.arange(0, SUMMED // LANES)
        there = (row < programs)[:, None] & (column < WIDTH)[None, :]
        parts += tl.load(sums_ptr + row[:, None] * WIDTH + column[None, :], mask=there, other=0.0)
    sums = tl.sum(parts, axis=0)
    value = _column(sums, column, 0)
    visible = value - value  # NaN or infinity anywhere reaches every parameter
    beta = tl.load(beta_ptr).to(tl.float64)
    k = column - _CLIMBS
    mine = (k >= 0) & (k < N)
    raw = tl.load(widths_ptr + k, mask=mine, other=1.0).to(tl.float64)
    d_width = tl.where(raw <= _FLOOR, 0.0, -beta * (sums + visible))
    d_start, d_alpha = (
        -beta * (_column(sums, column, 1) + visible),
        beta * (_column(sums, column, 2) + visible),
    )
    tl.store(d_widths_ptr + k, d_width.to(d_widths_ptr.dtype.element_ty), mask=mine)
    tl.store(d_start_ptr, d_start.to(d_start_ptr.dtype.element_ty))
    tl.store(d_alpha_ptr, d_alpha.to(d_alpha_ptr.dtype.element_ty))
    tl.store(d_beta_ptr, value.to(d_beta_ptr.dtype.element_ty))


def table_shape(n: int) -> tuple[int, int]:
    """Returns the number of rows, and that of a row, `n + 2`; see `ROWS` and `_tables_kernel`."""
    return KNOT_RESTS.value + 1, n + 2


def table_rows(
    start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor, dtype: torch.dtype, ramp: float = 0.0
) -> Tensor:
    """Returns the tables of a quantizer, of shape `table_shape`."""
    out = torch.empty(table_shape(widths.numel()), dtype=dtype, device=widths.device)
    fill_tables(out, (start, widths, scale_in, scale_out), ramp)
    return out


def fill_tables(out: Tensor, quantizer: tuple[Tensor, Tensor, Tensor, Tensor], ramp: float = 0.0) -> None:
    """Writes the tables of `start, widths, scale_in, scale_out` in one launch."""
    n = quantizer[1].numel()
    (ramp_bits,) = struct.unpack("<q", struct.pack("<d", ramp))  # a plain float would travel as float32
    _tables_kernel[(1,)](
        *(p.detach().contiguous() for p in quantizer),
        out,
        ramp_bits,
        N=n,
        LANES=int(triton.next_power_of_2(n + 2)),
        **FUSED,
    )


def empty_sums(programs: int, n: int, device: torch.device) -> Tensor:
    """Returns a row for the sums of every program, `[programs, CLIMBS + n]` float64."""
    return torch.empty(programs, CLIMBS + n, dtype=torch.float64, device=device)


def parameter_gradients(sums: Tensor, quantizer: QuantizerParameters) -> QuantizerParameters:
    """Returns the gradients of a quantizer's parameters from the programs' sums, in one launch.

    Args:
        sums: `[programs, CLIMBS + n]` float64, contiguous.
        quantizer: The parameters.
    """
    grads = QuantizerParameters(
        *(torch.empty_like(p, memory_format=torch.contiguous_format) for p in quantizer)
    )
    n = quantizer.widths.numel()
    lanes = int(triton.next_power_of_2(CLIMBS + n))
    _gradients_kernel[(1,)](
        sums, len(sums), quantizer.widths.detach().contiguous(), quantizer.scale_out.detach(), *grads,
        N=n, LANES=lanes, SUMMED=max(_SUMMED, _FEWEST_ROWS * lanes), num_warps=_SUMMING_WARPS, **FUSED,
    )  # fmt: skip
    return grads
