# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton kernels of the stem on channels-last maps: batch norm, ReLU, max pooling.

Forward: a pass for the statistics, one that writes the pooled map and one byte per maximum. Backward: for the
sums every window looks up its maximum; for the gradient every value of the input looks into the few windows
that hold it. The gradient of the pooling is never written.
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
    store_column_sums,
)
from lightning_n2uq.ops.backends.triton.positions import LAUNCH, UNSPECIALIZED
from lightning_n2uq.ops.formats.fused_activation import NormParameters, PoolGradients, Window

__all__ = ["backward", "empty_map", "forward"]

_MOST_VALUES = 2**31 - 1
_GROUP = 8  # channels of a thread: what it computes about rows and windows serves more values than with 4
_FORWARD, _INPUT = 6, 5  # programs whose registers fit a multiprocessor


@triton.jit
def _pixel(begin, row, height, width, WIDE: tl.constexpr):
    """Image, line and column of a row of a map; places are of 32 bits unless there are too many values."""
    pixel = begin + row
    if not WIDE:
        pixel = pixel.to(tl.int32)
    line = pixel // width
    return line // height, line % height, pixel % width


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    x_ptr, y_ptr, taps_ptr, norm_ptr, rows, channels, tiles, height, width, out_height, out_width,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, WIDE: tl.constexpr,
    COLUMNS: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """Maxima and their places (the first of equals) of one program; `rows` of the pooled map.

    ReLU comes last: it changes no maximum above 0, and others hand no gradient back.
    """
    channel, known, row, offset = place(channels, COLUMNS, LANES, GROUP)
    scale = per_channel(norm_ptr + 2 * channels, channel, known)
    shift = per_channel(norm_ptr + 3 * channels, channel, known)
    for tile in range(tiles):
        begin = first_row(tile, tiles, COLUMNS, LANES, GROUP)
        inside = row < rows - begin
        image, line, column = _pixel(begin, row, out_height, out_width, WIDE)
        best = tl.full([LANES, GROUP], float("-inf"), tl.float32)
        tap = tl.zeros([LANES, GROUP], tl.int32)
        for step in tl.static_range(KERNEL * KERNEL):
            y = line * STRIDE - PADDING + step // KERNEL
            x = column * STRIDE - PADDING + step % KERNEL
            there = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            source = ((image * height + y) * width + x) * channels + channel
            value = tl.load(x_ptr + source, mask=there & known, other=0.0).to(tl.float32)
            value = normed(value, scale, shift, True)
            better = there & ~(value <= best)  # a NaN, which all of a channel's values are, counts as larger
            best = tl.where(better, value, best)
            tap = tl.where(better, step, tap)
        target = begin * channels + offset
        best = tl.where(best < 0, 0.0, best)
        tl.store(y_ptr + target, best.to(y_ptr.dtype.element_ty), mask=inside & known)
        tl.store(taps_ptr + target, tap.to(tl.uint8), mask=inside & known)


@triton.jit
def _gradient(
    grad_ptr, taps_ptr, image, line, column, channel, known, inside, channels, out_height, out_width,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """What the windows that hold a value hand back to it."""
    REACH: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    d = tl.zeros(channel.shape, tl.float32)
    for step in tl.static_range(REACH * REACH):
        y = (line + PADDING) // STRIDE - step // REACH
        x = (column + PADDING) // STRIDE - step % REACH
        tap_y, tap_x = line + PADDING - y * STRIDE, column + PADDING - x * STRIDE
        there = inside & (y >= 0) & (y < out_height) & (x >= 0) & (x < out_width)
        there = there & (tap_y < KERNEL) & (tap_x < KERNEL) & known
        source = ((image * out_height + y) * out_width + x) * channels + channel
        tap = tl.load(taps_ptr + source, mask=there, other=255).to(tl.int32)
        g = tl.load(grad_ptr + source, mask=there, other=0.0).to(tl.float32)
        d += tl.where(tap == tap_y * KERNEL + tap_x, g, 0.0)
    return d


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sums_kernel(
    grad_ptr, taps_ptr, x_ptr, sums_ptr, norm_ptr,
    rows, channels, tiles, height, width, out_height, out_width,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, WIDE: tl.constexpr,
    COLUMNS: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """The sums 0 and 3 of `fused_activation.backward`, `[programs, 4, C]`; `rows` of the pooled map."""
    channel, known, row, offset = place(channels, COLUMNS, LANES)
    mean = per_channel(norm_ptr, channel, known)
    scale = per_channel(norm_ptr + 2 * channels, channel, known)
    shift = per_channel(norm_ptr + 3 * channels, channel, known)
    bias_sum, moment = tl.zeros([LANES, 4], tl.float32), tl.zeros([LANES, 4], tl.float32)
    for tile in range(tiles):
        begin = first_row(tile, tiles, COLUMNS, LANES)
        inside = known & (row < rows - begin)
        g = tl.load(grad_ptr + begin * channels + offset, mask=inside, other=0.0).to(tl.float32)
        tap = tl.load(taps_ptr + begin * channels + offset, mask=inside, other=0).to(tl.int32)
        image, line, column = _pixel(begin, row, out_height, out_width, WIDE)
        corner = (image * height + line * STRIDE - PADDING) * width + column * STRIDE - PADDING
        source = (corner + (tap // KERNEL) * width + tap % KERNEL) * channels + channel
        x = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
        d = tl.where(normed(x, scale, shift, True) <= 0, 0.0, g)
        bias_sum += d
        moment += d * (x - mean)
    store_column_sums(sums_ptr, 0, 4, bias_sum, channels, COLUMNS)
    store_column_sums(sums_ptr, 3, 4, moment, channels, COLUMNS)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _input_kernel(
    grad_ptr, taps_ptr, x_ptr, dx_ptr, correction_ptr, norm_ptr,
    rows, channels, tiles, height, width, out_height, out_width,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, WIDE: tl.constexpr,
    COLUMNS: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """The input's gradient; see `reference.fused_activation.norm_gradient`."""
    channel, known, row, offset = place(channels, COLUMNS, LANES, GROUP)
    mean = per_channel(norm_ptr, channel, known)
    scale = per_channel(norm_ptr + 2 * channels, channel, known)
    shift = per_channel(norm_ptr + 3 * channels, channel, known)
    common = per_channel(correction_ptr, channel, known)
    tilt = per_channel(correction_ptr + channels, channel, known)
    for tile in range(tiles):
        begin = first_row(tile, tiles, COLUMNS, LANES, GROUP)
        inside = row < rows - begin
        x = tl.load(x_ptr + begin * channels + offset, mask=inside & known, other=0.0).to(tl.float32)
        image, line, column = _pixel(begin, row, height, width, WIDE)
        d = _gradient(
            grad_ptr, taps_ptr, image, line, column, channel, known, inside, channels, out_height, out_width,
            KERNEL, STRIDE, PADDING,
        )  # fmt: skip
        d = tl.where(normed(x, scale, shift, True) <= 0, 0.0, d)
        d = (d - common - (x - mean) * tilt) * scale
        tl.store(dx_ptr + begin * channels + offset, d.to(dx_ptr.dtype.element_ty), mask=inside & known)


def _constants(window: Window) -> dict[str, int]:
    return {"KERNEL": window.kernel, "STRIDE": window.stride, "PADDING": window.padding}


def forward(x: Tensor, norm: NormParameters, window: Window) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the pooled map, each maximum's position (uint8), both channels-last, and the statistics."""
    source = channels_last(x)
    stats, known = measured_norm(source, *norm)
    size = window.pooled(x.shape[2:])
    y = torch.empty([*x.shape[:2], *size], dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    taps, form = empty_map(y, torch.uint8), layout(y, _GROUP, _FORWARD)
    _forward_kernel[form.grid](source, y, taps, known, form.rows, form.channels, form.tiles,
        *x.shape[2:], *size, **_constants(window), WIDE=source.numel() > _MOST_VALUES,
        COLUMNS=form.columns, GROUP=_GROUP, **LAUNCH,
    )  # fmt: skip
    return y, taps, stats


def backward(
    grad: Tensor, taps: Tensor, x: Tensor, stats: Tensor, norm: NormParameters, window: Window
) -> PoolGradients:
    """Returns all gradients; that of the map is channels-last."""
    source, grad = channels_last(x), channels_last(grad)
    known, dx = known_norm(stats, *norm), empty_map(x, x.dtype)
    pooled, form = layout(grad), layout(source, _GROUP, _INPUT)
    sums = torch.empty(pooled.grid[0], 4, form.channels, dtype=torch.float64, device=x.device)
    sizes = *x.shape[2:], *grad.shape[2:]
    shape = {**_constants(window), "WIDE": source.numel() > _MOST_VALUES, **LAUNCH}
    _sums_kernel[pooled.grid](grad, taps, source, sums, known, pooled.rows, form.channels, pooled.tiles,
        *sizes, COLUMNS=pooled.columns, **shape,
    )  # fmt: skip
    correction, (gamma, beta, *_) = channel_gradients(sums, known, norm, None, form.rows)
    _input_kernel[form.grid](grad, taps, source, dx, correction, known, form.rows, form.channels, form.tiles,
        *sizes, COLUMNS=form.columns, GROUP=_GROUP, **shape,
    )  # fmt: skip
    return PoolGradients(dx, gamma, beta)  # type: ignore[arg-type]
