# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton kernels of a residual block's end on channels-last maps: norms, sum, bias, PReLU, bias.

Forward: a pass for the statistics of every norm and one for the value. Backward: one pass for all sums, one
for both gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_n2uq.ops.backends.triton.channels import (
    channel_gradients,
    channels_last,
    empty_map,
    first_row,
    known_norm,
    layout,
    measured_norm,
    normed,
    per_channel,
    place,
    prelu,
    store_column_sums,
)
from lightning_n2uq.ops.backends.triton.positions import LAUNCH, UNSPECIALIZED
from lightning_n2uq.ops.formats.fused_activation import NormParameters, PReLUParameters, ResidualGradients

__all__ = ["backward", "empty_map", "forward"]


@triton.jit
def _norm_numbers(norm_ptr, channel, known, channels, NORM: tl.constexpr):
    """Mean, scale, shift of every value's channel; unused without a norm."""
    mean = tl.zeros(channel.shape, tl.float32)
    scale, shift = mean, mean
    if NORM:
        mean = per_channel(norm_ptr, channel, known)
        scale = per_channel(norm_ptr + 2 * channels, channel, known)
        shift = per_channel(norm_ptr + 3 * channels, channel, known)
    return mean, scale, shift


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    x_ptr, other_ptr, y_ptr, norm_ptr, other_norm_ptr, bias_in_ptr, slope_ptr, bias_out_ptr,
    rows, channels, tiles, OTHER: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """The value of one program."""
    channel, known, row, offset = place(channels, COLUMNS, LANES)
    _, scale, shift = _norm_numbers(norm_ptr, channel, known, channels, True)
    _, other_scale, other_shift = _norm_numbers(other_norm_ptr, channel, known, channels, OTHER)
    bias_in, slope = per_channel(bias_in_ptr, channel, known), per_channel(slope_ptr, channel, known)
    bias_out = per_channel(bias_out_ptr, channel, known)
    for tile in range(tiles):
        begin = first_row(tile, tiles, COLUMNS, LANES)
        inside = known & (row < rows - begin)
        x = tl.load(x_ptr + begin * channels + offset, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(other_ptr + begin * channels + offset, mask=inside, other=0.0).to(tl.float32)
        u = normed(x, scale, shift, True) + normed(z, other_scale, other_shift, OTHER) + bias_in
        y = prelu(u, slope, bias_out)
        tl.store(y_ptr + begin * channels + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sums_kernel(
    grad_ptr, x_ptr, other_ptr, sums_ptr, other_sums_ptr, norm_ptr, other_norm_ptr, bias_in_ptr, slope_ptr,
    rows, channels, tiles, OTHER: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """Sums `[programs along rows, 4, C]` of `reference.fused_activation.backward`, for both branches."""
    channel, known, row, offset = place(channels, COLUMNS, LANES)
    mean, scale, shift = _norm_numbers(norm_ptr, channel, known, channels, True)
    other_mean, other_scale, other_shift = _norm_numbers(other_norm_ptr, channel, known, channels, OTHER)
    bias_in, slope = per_channel(bias_in_ptr, channel, known), per_channel(slope_ptr, channel, known)
    zero = tl.zeros([LANES, 4], tl.float32)
    bias_sum, slope_sum, out_sum, moment, other_moment = zero, zero, zero, zero, zero
    for tile in range(tiles):
        begin = first_row(tile, tiles, COLUMNS, LANES)
        inside = known & (row < rows - begin)
        x = tl.load(x_ptr + begin * channels + offset, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(other_ptr + begin * channels + offset, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + begin * channels + offset, mask=inside, other=0.0).to(tl.float32)
        u = normed(x, scale, shift, True) + normed(z, other_scale, other_shift, OTHER) + bias_in
        d = tl.where(u > 0, g, g * slope)
        out_sum += g
        slope_sum += tl.where(inside & (u <= 0), g * u, 0.0)
        bias_sum += d
        moment += tl.where(inside, d * (x - mean), 0.0)
        if OTHER:
            other_moment += tl.where(inside, d * (z - other_mean), 0.0)
    store_column_sums(sums_ptr, 0, 4, bias_sum, channels, COLUMNS)
    store_column_sums(sums_ptr, 1, 4, slope_sum, channels, COLUMNS)
    store_column_sums(sums_ptr, 2, 4, out_sum, channels, COLUMNS)
    store_column_sums(sums_ptr, 3, 4, moment, channels, COLUMNS)
    if OTHER:
        store_column_sums(other_sums_ptr, 0, 4, bias_sum, channels, COLUMNS)
        store_column_sums(other_sums_ptr, 3, 4, other_moment, channels, COLUMNS)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _input_kernel(
    grad_ptr, x_ptr, other_ptr, dx_ptr, dother_ptr, correction_ptr, other_correction_ptr,
    norm_ptr, other_norm_ptr, bias_in_ptr, slope_ptr,
    rows, channels, tiles, OTHER: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of both branches' inputs; see `reference.fused_activation.norm_gradient`."""
    channel, known, row, offset = place(channels, COLUMNS, LANES)
    mean, scale, shift = _norm_numbers(norm_ptr, channel, known, channels, True)
    other_mean, other_scale, other_shift = _norm_numbers(other_norm_ptr, channel, known, channels, OTHER)
    bias_in, slope = per_channel(bias_in_ptr, channel, known), per_channel(slope_ptr, channel, known)
    common = per_channel(correction_ptr, channel, known)
    tilt = per_channel(correction_ptr + channels, channel, known)
    other_tilt = tilt
    if OTHER:
        other_tilt = per_channel(other_correction_ptr + channels, channel, known)
    for tile in range(tiles):
        begin = first_row(tile, tiles, COLUMNS, LANES)
        inside = known & (row < rows - begin)
        x = tl.load(x_ptr + begin * channels + offset, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(other_ptr + begin * channels + offset, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + begin * channels + offset, mask=inside, other=0.0).to(tl.float32)
        u = normed(x, scale, shift, True) + normed(z, other_scale, other_shift, OTHER) + bias_in
        d = tl.where(u > 0, g, g * slope)
        dx = (d - common - (x - mean) * tilt) * scale
        if OTHER:
            d = (d - common - (z - other_mean) * other_tilt) * other_scale
        tl.store(dx_ptr + begin * channels + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        tl.store(dother_ptr + begin * channels + offset, d.to(dother_ptr.dtype.element_ty), mask=inside)


def forward(
    x: Tensor, norm: NormParameters, other: Tensor, other_norm: NormParameters | None, act: PReLUParameters
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the block's output, channels-last, and the batch's statistics of both branches."""
    source, second = channels_last(x), channels_last(other)
    stats, first = measured_norm(source, *norm)
    other_stats, other_first = torch.empty(2, 0, dtype=torch.float32, device=x.device), first
    if other_norm is not None:
        other_stats, other_first = measured_norm(second, *other_norm)
    y, form = empty_map(x, x.dtype), layout(source)
    _forward_kernel[form.grid](source, second, y, first, other_first, *(p.detach() for p in act),
        form.rows, form.channels, form.tiles, OTHER=other_norm is not None, COLUMNS=form.columns, **LAUNCH,
    )  # fmt: skip
    return y, stats, other_stats


def backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    norm: NormParameters,
    other: Tensor,
    other_stats: Tensor,
    other_norm: NormParameters | None,
    act: PReLUParameters,
) -> ResidualGradients:
    """Returns all gradients; those of the maps are channels-last."""
    source, second, grad = channels_last(x), channels_last(other), channels_last(grad)
    first = known_norm(stats, *norm)
    other_first = first if other_norm is None else known_norm(other_stats, *other_norm)
    dx, dother, form = empty_map(x, x.dtype), empty_map(other, other.dtype), layout(source)
    sums = torch.empty(form.grid[0], 4, form.channels, dtype=torch.float64, device=x.device)
    other_sums = sums if other_norm is None else torch.empty_like(sums)
    tables = first, other_first, act.bias_in.detach(), act.slope.detach()
    sizes = form.rows, form.channels, form.tiles
    shape = {"OTHER": other_norm is not None, "COLUMNS": form.columns, **LAUNCH}
    _sums_kernel[form.grid](grad, source, second, sums, other_sums, *tables, *sizes, **shape)
    correction, grads = channel_gradients(sums, first, norm, act, form.rows)
    other_correction, other_gamma, other_beta = correction, None, None
    if other_norm is not None:
        other_correction, (other_gamma, other_beta, *_) = channel_gradients(
            other_sums, other_first, other_norm, None, form.rows
        )
    _input_kernel[form.grid](grad, source, second, dx, dother, correction, other_correction, *tables,
        *sizes, **shape,
    )  # fmt: skip
    return ResidualGradients(dx, dother, *grads, other_gamma, other_beta)  # type: ignore[arg-type]
