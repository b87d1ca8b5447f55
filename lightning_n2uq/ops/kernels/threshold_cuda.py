# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton kernels of the activation quantizer: one pass forward, one pass backward, same bits as the oracle.

The interface is that of `threshold_cpu`. The scaled input is a product of its own, since a multiply-add would
round once where the oracle rounds twice. The backward pass gives every program a fixed run of tiles and
accumulates, per thread, up to sixteen segments at a time (a pass more per sixteen segments beyond 4 bits);
programs leave float64 partial sums, added in fixed order. Under `TRITON_INTERPRET=1` the kernels run
on CPU tensors, which is how they are tested without a GPU. Nothing waits for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_n2uq.ops.kernels.positions_cuda import (
    GROUP,
    LANES,
    add_group,
    count_below,
    held_bounds,
    index_of,
    join4,
    load_bounds,
    split4,
    store_segments,
)
from lightning_n2uq.ops.kernels.product_cuda import product
from lightning_n2uq.ops.tables import ThresholdTables, output_step

_TILE = LANES * GROUP
_PROGRAMS = 1056  # 8 for each of 132 multiprocessors; a fixed number keeps the order of additions
_FEWER_PROGRAMS = 528  # 4, as many as fit with sixteen segments in registers


@triton.jit
def _ramp(s, begins_ptr, slopes_ptr, step, count):
    """`reference.ramp_staircase`: finished ramps are counted, the open one is added."""
    finished, rising = tl.zeros_like(s), tl.zeros_like(s)
    for k in range(count):
        ramp = (s - tl.load(begins_ptr + k)) * tl.load(slopes_ptr + k)
        finished += tl.where(ramp >= 1, 1.0, 0.0).to(s.dtype)
        rising = tl.where((ramp > 0) & (ramp < 1), ramp, rising)
    return tl.where(s != s, s, (finished + rising) * step)


@triton.jit
def _count4(s, held, bounds_ptr, count, HELD: tl.constexpr, CHUNKS: tl.constexpr):
    """`count_below` of `[LANES, 4]`."""
    a, b, c, d = split4(s)
    return join4(
        count_below(a, held, bounds_ptr, count, HELD, CHUNKS),
        count_below(b, held, bounds_ptr, count, HELD, CHUNKS),
        count_below(c, held, bounds_ptr, count, HELD, CHUNKS),
        count_below(d, held, bounds_ptr, count, HELD, CHUNKS),
    )


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, alpha_ptr, bounds_ptr, values_ptr, begins_ptr, slopes_ptr, step_ptr, beta_ptr, numel, count,
    RAMPED: tl.constexpr, HELD: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of the forward pass; tables are in the compute dtype."""
    alpha = tl.load(alpha_ptr)
    begin = tl.program_id(0).to(tl.int64) * (LANES * 4)
    place = tl.arange(0, LANES)[:, None] * 4 + tl.arange(0, 4)[None, :]
    inside = place < numel - begin
    x = tl.load(x_ptr + begin + place, mask=inside, other=0.0).to(alpha.dtype)
    s = product(x, tl.zeros_like(x) + alpha)
    if RAMPED:
        beta = tl.load(beta_ptr).to(alpha.dtype)
        y = _ramp(s, begins_ptr, slopes_ptr, tl.load(step_ptr), count) * beta
    else:
        held = load_bounds(bounds_ptr, 0, count, HELD)
        code = index_of(_count4(s, held, bounds_ptr, count, HELD, CHUNKS))
        y = tl.where(s != s, s, tl.load(values_ptr + code))
    tl.store(y_ptr + begin + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _level(s, index, thresholds_ptr, levels_ptr, n):
    """The staircase `D q`, NaN for NaN: a segment has one threshold, so one more comparison gives `q`."""
    has_threshold = (index > 0) & (index <= n)
    threshold = tl.load(thresholds_ptr + index - 1, mask=has_threshold, other=float("inf"))
    code = tl.maximum(index - 1, 0) + (s > threshold).to(tl.int32)
    return tl.where(s != s, s, tl.load(levels_ptr + code))


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, dx_ptr, sums_ptr, alpha_ptr, beta_ptr, knots_ptr, slopes_ptr, bounds_ptr, levels_ptr,
    begins_ptr, ramp_slopes_ptr, step_ptr, numel, n, tiles, first,
    RAMPED: tl.constexpr, WRITES: tl.constexpr, HELD: tl.constexpr, CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:  # fmt: skip
    """`tiles` tiles: sums over the segments from `first` on, and with `WRITES` all the rest.

    `sums` is `[programs, n + 2, 2]` float64; its row 0, a flat end, holds the sum of `g value` instead.
    """
    program = tl.program_id(0).to(tl.int64)
    alpha = tl.load(alpha_ptr)
    gain = alpha * tl.load(beta_ptr).to(alpha.dtype)
    held = load_bounds(knots_ptr, 0, n + 1, HELD)
    grad_sum = tl.zeros([HELD, LANES], alpha.dtype)
    grad_x_sum = tl.zeros([HELD, LANES], alpha.dtype)
    value_sum = tl.zeros([LANES, 4], alpha.dtype)
    place = tl.arange(0, LANES)[:, None] * 4 + tl.arange(0, 4)[None, :]
    for tile in range(tiles):
        begin = (program * tiles + tile) * (LANES * 4)
        inside = place < numel - begin
        x = tl.load(x_ptr + begin + place, mask=inside, other=0.0).to(alpha.dtype)
        g = tl.load(grad_ptr + begin + place, mask=inside, other=0.0).to(alpha.dtype)
        s = product(x, tl.zeros_like(x) + alpha)
        segment = _count4(s, held, knots_ptr, n + 1, HELD, CHUNKS)
        segment = tl.where(s != s, tl.zeros_like(s) + n, segment)
        grad_sum, grad_x_sum = add_group(grad_sum, grad_x_sum, g, x, segment, first, n, HELD)
        if WRITES:
            index = index_of(segment)
            slope = tl.where(s != s, s, tl.load(slopes_ptr + index))
            dx = g * (slope * gain)
            tl.store(dx_ptr + begin + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            if RAMPED:
                value = _ramp(s, begins_ptr, ramp_slopes_ptr, tl.load(step_ptr), n)
            else:
                value = _level(s, index, bounds_ptr, levels_ptr, n)
            value_sum += tl.where(inside, g * value, 0.0).to(alpha.dtype)
    sums = sums_ptr + program * (n + 2) * 2
    store_segments(sums, grad_sum, grad_x_sum, first, n, HELD)
    if WRITES:
        zero = tl.zeros([], tl.float64)
        tl.store(sums, tl.sum(tl.sum(value_sum.to(tl.float64), axis=1), axis=0))
        tl.store(sums + 1, zero)
        tl.store(sums + 2 * n + 2, zero)
        tl.store(sums + 2 * n + 3, zero)


def _step(n: int, tables: ThresholdTables, ramped: bool) -> Tensor:
    """`D`, or any number where no kernel reads it."""
    knots = tables.knots
    return torch.full((), output_step(n), dtype=knots.dtype, device=knots.device) if ramped else knots


def forward(x: Tensor, tables: ThresholdTables, scale_out: Tensor, y: Tensor, ramped: bool) -> None:
    """Writes the quantized `x` to `y`, both 1-D of one dtype; `ramped` asks for the ramps of `tables`."""
    if x.numel() == 0:
        return
    n = tables.thresholds.numel()
    held = held_bounds(n)
    _forward_kernel[(triton.cdiv(x.numel(), _TILE),)](
        x, y, tables.scale_in, tables.thresholds, tables.outputs, tables.ramp_starts, tables.ramp_slopes,
        _step(n, tables, ramped), scale_out.detach(), x.numel(), n,
        RAMPED=ramped, HELD=held, CHUNKS=triton.cdiv(n, held), LANES=LANES,
    )  # fmt: skip


def backward(
    grad: Tensor, x: Tensor, tables: ThresholdTables, scale_out: Tensor, dx: Tensor, ramped: bool
) -> tuple[Tensor, Tensor]:
    """Writes the input's gradient to `dx` and returns the sums of `reference.threshold_segment_sums`.

    The second result is the first place of the sums, a flat end, which nobody reads as such.
    """
    n = tables.thresholds.numel()
    if x.numel() == 0:
        sums = torch.zeros(n + 2, 2, dtype=torch.float64, device=x.device)
        return sums, sums[0, 0]
    held = held_bounds(n)
    wanted = _FEWER_PROGRAMS if held > 8 else _PROGRAMS
    tiles = triton.cdiv(x.numel(), _TILE * wanted)
    programs = triton.cdiv(x.numel(), _TILE * tiles)
    partial = torch.empty(programs, n + 2, 2, dtype=torch.float64, device=x.device)
    for first in range(0, n + 1, held):
        _backward_kernel[(programs,)](
            grad, x, dx, partial, tables.scale_in, scale_out.detach(), tables.knots, tables.slopes,
            tables.thresholds, tables.levels, tables.ramp_starts, tables.ramp_slopes,
            _step(n, tables, ramped), x.numel(), n, tiles, first,
            RAMPED=ramped, WRITES=first == 0, HELD=held, CHUNKS=triton.cdiv(n + 1, held), LANES=LANES,
        )  # fmt: skip
    sums = partial.sum(0)
    return sums, sums[0, 0]
