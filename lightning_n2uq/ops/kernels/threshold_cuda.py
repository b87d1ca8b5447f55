# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton kernels of the activation quantizer: one pass forward, one pass backward, same bits as the oracle.

The interface is that of `threshold_cpu`. Fused multiply-adds are off, because they round once where the
oracle rounds twice. The backward pass gives every program a fixed run of tiles and accumulates, per thread,
sixteen segments at a time (a pass more per sixteen segments beyond 4 bits); programs leave float64 partial
sums, which are added in fixed order. Under `TRITON_INTERPRET=1` the kernels run on CPU tensors, which is how
they are tested without a GPU. Nothing waits for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_n2uq.ops.tables import ThresholdTables, output_step

_TILE = 1024
_BACKWARD_TILE = 256
_SEGMENTS = 16  # accumulated at a time: more would not fit a thread's registers
_PROGRAMS = 2048  # enough for any device; a fixed number keeps the order of additions


@triton.jit
def _staircase(s, bounds_ptr, values_ptr, count):
    """`values[number of bounds below s]`, NaN for NaN."""
    value = tl.load(values_ptr) + tl.zeros_like(s)
    for k in range(count):
        value = tl.where(s > tl.load(bounds_ptr + k), tl.load(values_ptr + k + 1), value)
    return tl.where(s != s, s, value)


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
def _forward_kernel(
    x_ptr,
    y_ptr,
    alpha_ptr,
    bounds_ptr,
    values_ptr,
    begins_ptr,
    slopes_ptr,
    step_ptr,
    beta_ptr,
    numel,
    count,
    RAMPED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One tile of the forward pass; tables are in the compute dtype."""
    alpha = tl.load(alpha_ptr)
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = offset < numel
    s = tl.load(x_ptr + offset, mask=inside, other=0.0).to(alpha.dtype) * alpha
    if RAMPED:
        y = _ramp(s, begins_ptr, slopes_ptr, tl.load(step_ptr), count) * tl.load(beta_ptr)
    else:
        y = _staircase(s, bounds_ptr, values_ptr, count)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr,
    x_ptr,
    dx_ptr,
    sums_ptr,
    values_ptr,
    alpha_ptr,
    knots_ptr,
    gains_ptr,
    bounds_ptr,
    levels_ptr,
    begins_ptr,
    slopes_ptr,
    step_ptr,
    numel,
    count,
    tiles,
    first,
    RAMPED: tl.constexpr,
    WRITES: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """`tiles` tiles: sums over the segments `first .. first + SEGMENTS - 1`, and with `WRITES` all the rest.

    `sums` is `[programs, SEGMENTS, 2]` and `values` `[programs]`, float64.
    """
    program = tl.program_id(0)
    alpha = tl.load(alpha_ptr)
    segments = first + tl.arange(0, SEGMENTS)
    grad_sum = tl.zeros([SEGMENTS, TILE], alpha.dtype)
    grad_x_sum = tl.zeros([SEGMENTS, TILE], alpha.dtype)
    value_sum = tl.zeros([TILE], tl.float64)
    for tile in range(tiles):
        offset = (program.to(tl.int64) * tiles + tile) * TILE + tl.arange(0, TILE)
        inside = offset < numel
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(alpha.dtype)
        g = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(alpha.dtype)
        s = x * alpha
        segment = tl.zeros([TILE], tl.int32)
        for k in range(count + 1):
            segment += (s > tl.load(knots_ptr + k)).to(tl.int32)
        segment = tl.where(inside, tl.where(s != s, count, segment), 0)
        mine = segment[None, :] == segments[:, None]
        grad_sum += tl.where(mine, g[None, :], 0.0).to(alpha.dtype)
        grad_x_sum += tl.where(mine, (g * x)[None, :], 0.0).to(alpha.dtype)
        if WRITES:
            dx = g * _staircase(s, knots_ptr, gains_ptr, count + 1)
            tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            if RAMPED:
                value = _ramp(s, begins_ptr, slopes_ptr, tl.load(step_ptr), count)
            else:
                value = _staircase(s, bounds_ptr, levels_ptr, count)
            value_sum += tl.where(inside, g.to(tl.float64) * value.to(tl.float64), 0.0)
    row = (program.to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)) * 2
    tl.store(sums_ptr + row, tl.sum(grad_sum.to(tl.float64), axis=1))
    tl.store(sums_ptr + row + 1, tl.sum(grad_x_sum.to(tl.float64), axis=1))
    if WRITES:
        tl.store(values_ptr + program, tl.sum(value_sum, axis=0))


def forward(x: Tensor, tables: ThresholdTables, scale_out: Tensor, y: Tensor, ramped: bool) -> None:
    """Writes the quantized `x` to `y`, both 1-D of one dtype; `ramped` asks for the ramps of `tables`."""
    if x.numel() == 0:
        return
    n, dtype = tables.thresholds.numel(), tables.knots.dtype
    _forward_kernel[(triton.cdiv(x.numel(), _TILE),)](
        x,
        y,
        tables.scale_in,
        tables.thresholds,
        tables.outputs,
        tables.ramp_starts,
        tables.ramp_slopes,
        torch.full((), output_step(n), dtype=dtype, device=x.device),
        scale_out.detach().to(dtype).reshape(()),
        x.numel(),
        n,
        RAMPED=ramped,
        TILE=_TILE,
        enable_fp_fusion=False,
    )


def backward(
    grad: Tensor, x: Tensor, tables: ThresholdTables, scale_out: Tensor, dx: Tensor, ramped: bool
) -> tuple[Tensor, Tensor]:
    """Writes the input's gradient to `dx` and returns the sums of `reference.threshold_segment_sums`."""
    n = tables.thresholds.numel()
    sums = torch.zeros(n + 2, 2, dtype=torch.float64, device=x.device)
    if x.numel() == 0:
        return sums, sums.new_zeros(())
    tiles = triton.cdiv(x.numel(), _BACKWARD_TILE * _PROGRAMS)
    programs = triton.cdiv(x.numel(), _BACKWARD_TILE * tiles)
    values = sums.new_empty(programs)
    for first in range(1, n + 1, _SEGMENTS):
        partial = sums.new_empty(programs, _SEGMENTS, 2)
        _launch_backward(
            grad, x, tables, scale_out, dx, partial, values, (programs, tiles), first=first, ramped=ramped
        )
        last = min(first + _SEGMENTS, n + 1)
        sums[first:last] = partial.sum(0)[: last - first]
    return sums, values.sum()


def _launch_backward(
    grad: Tensor,
    x: Tensor,
    tables: ThresholdTables,
    scale_out: Tensor,
    dx: Tensor,
    partial: Tensor,
    values: Tensor,
    layout: tuple[int, int],
    first: int,
    ramped: bool,
) -> None:
    """One pass over the input for `_SEGMENTS` segments; the first pass writes everything else too."""
    n, dtype = tables.thresholds.numel(), tables.knots.dtype
    gain = tables.scale_in * scale_out.detach().reshape(()).to(dtype)
    _backward_kernel[(layout[0],)](
        grad,
        x,
        dx,
        partial,
        values,
        tables.scale_in,
        tables.knots,
        tables.slopes * gain,
        tables.thresholds,
        tables.levels,
        tables.ramp_starts,
        tables.ramp_slopes,
        torch.full((), output_step(n), dtype=dtype, device=x.device),
        x.numel(),
        n,
        layout[1],
        first,
        RAMPED=ramped,
        WRITES=first == 1,
        SEGMENTS=_SEGMENTS,
        TILE=_BACKWARD_TILE,
        enable_fp_fusion=False,
    )
