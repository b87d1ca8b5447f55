# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton kernels of the fused pre-activation chain on channels-last maps: norm, bias, PReLU, bias, quantizer.

Forward: one pass for the norm's statistics, one that writes the quantized map and its codes. Backward: one
pass for all sums, and behind a norm, which needs the sums first, one more for the input's gradient. Nothing
waits for the device, and no intermediate is written.

The codes of a pixel's channels are packed one behind the other, 1, 2, 4 or 8 bits each (3-bit codes take 4).
Behind the codes every program of the forward pass leaves one byte that says whether it has seen a NaN, which
has no code; `rebuild` then gives NaN for all values of that program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_n2uq.ops.kernels.channels_cuda import (
    Layout,
    channels_last,
    empty_map,
    first_row,
    known_norm,
    layout,
    measured_norm,
    per_channel,
    place,
    store_column_sums,
)
from lightning_n2uq.ops.kernels.positions_cuda import (
    BACKWARD_TILE,
    MOST_HELD,
    add_to_segments,
    count_below,
    held_bounds,
    index_of,
    level_of,
    load_bounds,
    segment_of,
    slope_of,
)
from lightning_n2uq.ops.kernels.tables_cuda import parameter_gradients, tables
from lightning_n2uq.ops.packed_format import Activation, Norm

MOST_STEPS = MOST_HELD - 1  # beyond 4 bits the chain stays in separate operators

_FORWARD_TILE = 1024
_QUANTIZER = tuple[Tensor, Tensor, Tensor, Tensor]


def stored_bits(n: int) -> int:
    """Bits that a code 0 .. `n` takes in memory: 1, 2, 4 or 8."""
    return int(triton.next_power_of_2(n.bit_length()))


def packed_size(x: Tensor, n: int) -> int:
    """Bytes of the packed codes of a map `[N, C, H, W]`."""
    form = layout(x, _FORWARD_TILE)
    per_row = -(-form.channels * stored_bits(n) // 8)
    return form.rows * per_row + form.grid[0] * form.grid[1]


@triton.jit
def _channel_numbers(
    norm_ptr, bias_in_ptr, slope_ptr, bias_out_ptr, channel, known, channels,
    NORM: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Scale, shift, bias, slope, bias of every value's channel; what is not there is zero and not used."""
    zero = tl.zeros(channel.shape, tl.float32)
    scale, shift, bias_in, slope, bias_out = zero, zero, zero, zero, zero
    if NORM:
        scale = per_channel(norm_ptr + 2 * channels, channel, known)
        shift = per_channel(norm_ptr + 3 * channels, channel, known)
    if ACT:
        bias_in = per_channel(bias_in_ptr, channel, known)
        slope = per_channel(slope_ptr, channel, known)
        bias_out = per_channel(bias_out_ptr, channel, known)
    return scale, shift, bias_in, slope, bias_out


@triton.jit
def _chain(x, scale, shift, bias_in, slope, bias_out, NORM: tl.constexpr, ACT: tl.constexpr):
    """What PReLU sees, and what the quantizer sees; see `packed_reference.chain`."""
    if NORM:
        x = x * scale
        x = x + shift
    v = x
    if ACT:
        x = x + bias_in
        v = tl.where(x > 0, x, slope * x) + bias_out
    return x, v


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, packed_ptr, flags_ptr, norm_ptr, bias_in_ptr, slope_ptr, bias_out_ptr,
    alpha_ptr, bounds_ptr, outputs_ptr, rows, channels, tiles, n, row_bytes,
    NORM: tl.constexpr, ACT: tl.constexpr, HELD: tl.constexpr, BITS: tl.constexpr,
    COLUMNS: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """Quantized values, packed codes and the NaN flag of one program."""
    CODES: tl.constexpr = 8 // BITS  # per byte
    channel, known, row, offset = place(channels, COLUMNS, TILE)
    scale, shift, bias_in, slope, bias_out = _channel_numbers(
        norm_ptr, bias_in_ptr, slope_ptr, bias_out_ptr, channel, known, channels, NORM, ACT
    )
    alpha = tl.load(alpha_ptr)
    held = load_bounds(bounds_ptr, 0, n, HELD)
    nans = tl.zeros([TILE], tl.int32)
    # Where the columns end within a byte, that byte is this program's alone: columns are a multiple of it.
    BYTES: tl.constexpr = (COLUMNS + CODES - 1) // CODES
    byte = tl.arange(0, TILE // COLUMNS * BYTES)
    byte_row, byte_column = byte // BYTES, tl.program_id(1) * BYTES + byte % BYTES
    for tile in range(tiles):
        begin = first_row(tile, tiles, COLUMNS, TILE)
        inside = known & (row < rows - begin)
        x = tl.load(x_ptr + begin * channels + offset, mask=inside, other=0.0).to(tl.float32)
        _, v = _chain(x, scale, shift, bias_in, slope, bias_out, NORM, ACT)
        s = v * alpha
        code = index_of(count_below(s, held, bounds_ptr, n, HELD, 1))
        y = tl.where(s != s, s, tl.load(outputs_ptr + code))
        tl.store(y_ptr + begin * channels + offset, y.to(y_ptr.dtype.element_ty), mask=inside)
        nans |= (inside & (s != s)).to(tl.int32)
        code = tl.where(inside, code, 0)
        if COLUMNS >= CODES:
            grouped = tl.reshape(code, [TILE // CODES, CODES])
            packed = tl.sum(grouped << (tl.arange(0, CODES) * BITS)[None, :], axis=1)
        else:
            grouped = tl.reshape(code, [TILE // COLUMNS, COLUMNS])
            packed = tl.sum(grouped << (tl.arange(0, COLUMNS) * BITS)[None, :], axis=1)
        there = (byte_row < rows - begin) & (byte_column < row_bytes)
        tl.store(packed_ptr + (begin + byte_row) * row_bytes + byte_column, packed.to(tl.uint8), mask=there)
    flag = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(flags_ptr + flag, tl.max(nans, axis=0).to(tl.uint8))


@triton.jit
def _rebuild_kernel(
    packed_ptr, flags_ptr, outputs_ptr, y_ptr, rows, channels, tiles, row_bytes,
    BITS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """The quantized values of one program from its codes."""
    CODES: tl.constexpr = 8 // BITS
    channel, known, row, offset = place(channels, COLUMNS, TILE)
    flag = tl.load(flags_ptr + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1))
    for tile in range(tiles):
        begin = first_row(tile, tiles, COLUMNS, TILE)
        inside = known & (row < rows - begin)
        where = (begin + row) * row_bytes + channel // CODES
        byte = tl.load(packed_ptr + where, mask=inside, other=0).to(tl.int32)
        code = (byte >> (channel % CODES * BITS)) & ((1 << BITS) - 1)
        y = tl.load(outputs_ptr + code)
        y = tl.where(flag > 0, float("nan"), y)
        tl.store(y_ptr + begin * channels + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sums_kernel(
    grad_ptr, x_ptr, dx_ptr, sums_ptr, segments_ptr, norm_ptr, bias_in_ptr, slope_ptr, bias_out_ptr,
    alpha_ptr, beta_ptr, knots_ptr, slopes_ptr, bounds_ptr, levels_ptr, rows, channels, tiles, n,
    NORM: tl.constexpr, ACT: tl.constexpr, HELD: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """All sums of one program, and without a norm the input's gradient.

    `sums` `[programs along rows, 4, C]` are those of `packed_reference.backward`; `segments`
    `[programs, n + 2, 2]` those of `threshold_cuda`, the sum of `g value` in the first place.
    """
    channel, known, row, offset = place(channels, COLUMNS, TILE)
    scale, shift, bias_in, slope, bias_out = _channel_numbers(
        norm_ptr, bias_in_ptr, slope_ptr, bias_out_ptr, channel, known, channels, NORM, ACT
    )
    mean = scale
    if NORM:
        mean = per_channel(norm_ptr, channel, known)
    alpha = tl.load(alpha_ptr)
    gain = alpha * tl.load(beta_ptr).to(tl.float32)
    held = load_bounds(knots_ptr, 0, n + 1, HELD)
    grad_sum, grad_v_sum = tl.zeros([HELD, TILE], tl.float32), tl.zeros([HELD, TILE], tl.float32)
    value_sum, bias_sum = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    slope_sum, out_sum = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    product_sum = tl.zeros([TILE], tl.float32)
    begin = first_row(0, tiles, COLUMNS, TILE)
    inside = known & (row < rows - begin)
    next_x = tl.load(x_ptr + begin * channels + offset, mask=inside, other=0.0)
    next_g = tl.load(grad_ptr + begin * channels + offset, mask=inside, other=0.0)
    for tile in range(tiles):
        x, g, inside = next_x.to(tl.float32), next_g.to(tl.float32), known & (row < rows - begin)
        dx_here = dx_ptr + begin * channels + offset
        begin += TILE // COLUMNS
        follows = known & (row < rows - begin) & (tile + 1 < tiles)  # loaded ahead of their turn
        next_x = tl.load(x_ptr + begin * channels + offset, mask=follows, other=0.0)
        next_g = tl.load(grad_ptr + begin * channels + offset, mask=follows, other=0.0)
        u, v = _chain(x, scale, shift, bias_in, slope, bias_out, NORM, ACT)
        s = v * alpha
        segment = segment_of(s, inside, held, knots_ptr, n, HELD, 1)
        grad_sum, grad_v_sum = add_to_segments(grad_sum, grad_v_sum, g, v, segment, 0, n, HELD)
        value_sum += tl.where(inside, g * level_of(s, segment, bounds_ptr, levels_ptr, n), 0.0)
        d = tl.where(inside, g * (slope_of(s, segment, slopes_ptr) * gain), 0.0)
        if ACT:
            out_sum += d
            slope_sum += tl.where(inside & (u <= 0), d * u, 0.0)
            d = tl.where(u > 0, d, d * slope)
        if ACT or NORM:
            bias_sum += d
        if NORM:
            product_sum += tl.where(inside, d * (x - mean), 0.0)
        else:
            tl.store(dx_here, d.to(dx_ptr.dtype.element_ty), mask=inside)
    if ACT or NORM:
        store_column_sums(sums_ptr, 0, 4, bias_sum, channels, COLUMNS)
        store_column_sums(sums_ptr, 1, 4, slope_sum, channels, COLUMNS)
        store_column_sums(sums_ptr, 2, 4, out_sum, channels, COLUMNS)
        store_column_sums(sums_ptr, 3, 4, product_sum, channels, COLUMNS)
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    segments = segments_ptr + program * (n + 2) * 2
    index = tl.arange(0, HELD)
    mine = (index > 0) & (index <= n)
    tl.store(segments + 2 * index, tl.sum(grad_sum.to(tl.float64), axis=1), mask=mine)
    tl.store(segments + 2 * index + 1, tl.sum(grad_v_sum.to(tl.float64), axis=1), mask=mine)
    tl.store(segments, tl.sum(value_sum.to(tl.float64), axis=0))


@triton.jit
def _input_kernel(
    grad_ptr, x_ptr, dx_ptr, correction_ptr, norm_ptr, bias_in_ptr, slope_ptr, bias_out_ptr,
    alpha_ptr, beta_ptr, knots_ptr, slopes_ptr, rows, channels, tiles, n,
    ACT: tl.constexpr, HELD: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """The input's gradient behind a norm; `correction` is `[2, C]`, see `packed_reference.norm_gradient`."""
    channel, known, row, offset = place(channels, COLUMNS, TILE)
    scale, shift, bias_in, slope, bias_out = _channel_numbers(
        norm_ptr, bias_in_ptr, slope_ptr, bias_out_ptr, channel, known, channels, True, ACT
    )
    mean = per_channel(norm_ptr, channel, known)
    common = per_channel(correction_ptr, channel, known)
    tilt = per_channel(correction_ptr + channels, channel, known)
    alpha = tl.load(alpha_ptr)
    gain = alpha * tl.load(beta_ptr).to(tl.float32)
    held = load_bounds(knots_ptr, 0, n + 1, HELD)
    for tile in range(tiles):
        begin = first_row(tile, tiles, COLUMNS, TILE)
        inside = known & (row < rows - begin)
        x = tl.load(x_ptr + begin * channels + offset, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + begin * channels + offset, mask=inside, other=0.0).to(tl.float32)
        u, v = _chain(x, scale, shift, bias_in, slope, bias_out, True, ACT)
        s = v * alpha
        segment = segment_of(s, inside, held, knots_ptr, n, HELD, 1)
        d = g * (slope_of(s, segment, slopes_ptr) * gain)
        if ACT:
            d = tl.where(u > 0, d, d * slope)
        d = (d - common - (x - mean) * tilt) * scale
        tl.store(dx_ptr + begin * channels + offset, d.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _channels_kernel(
    sums_ptr, norm_ptr, correction_ptr, d_gamma_ptr, d_beta_ptr, d_bias_in_ptr, d_slope_ptr, d_bias_out_ptr,
    rows, channels, NORM: tl.constexpr, ACT: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of the channels' parameters, and the norm's two corrections, from sums `[4, C]`."""
    channel = tl.program_id(0) * TILE + tl.arange(0, TILE)
    known = channel < channels
    bias = tl.load(sums_ptr + channel, mask=known, other=0.0)
    if NORM:
        inverse = per_channel(norm_ptr + channels, channel, known).to(tl.float64)
        product = tl.load(sums_ptr + 3 * channels + channel, mask=known, other=0.0)
        tl.store(correction_ptr + channel, (bias / rows).to(tl.float32), mask=known)
        tilt = product * inverse * inverse / rows
        tl.store(correction_ptr + channels + channel, tilt.to(tl.float32), mask=known)
        tl.store(d_gamma_ptr + channel, (product * inverse).to(d_gamma_ptr.dtype.element_ty), mask=known)
        tl.store(d_beta_ptr + channel, bias.to(d_beta_ptr.dtype.element_ty), mask=known)
    if ACT:
        slope = tl.load(sums_ptr + channels + channel, mask=known, other=0.0)
        out = tl.load(sums_ptr + 2 * channels + channel, mask=known, other=0.0)
        tl.store(d_bias_in_ptr + channel, bias.to(d_bias_in_ptr.dtype.element_ty), mask=known)
        tl.store(d_slope_ptr + channel, slope.to(d_slope_ptr.dtype.element_ty), mask=known)
        tl.store(d_bias_out_ptr + channel, out.to(d_bias_out_ptr.dtype.element_ty), mask=known)


def _row_bytes(form: Layout, bits: int) -> int:
    return -(-form.channels * bits // 8)


def forward(
    x: Tensor,
    norm_parameters: tuple[Tensor, Tensor] | None,
    eps: float,
    act: Activation | None,
    quantizer: _QUANTIZER,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `packed.packed_activation`; map and codes are channels-last."""
    source, n = channels_last(x), quantizer[1].numel()
    stats, norm = source.new_empty(2, 0, dtype=torch.float32), None
    if norm_parameters is not None:
        stats, norm = measured_norm(source, *norm_parameters, eps)
    table = tables(*quantizer, torch.float32, 0.0)
    form, bits = layout(source, _FORWARD_TILE), stored_bits(n)
    y = empty_map(x, dtype)
    packed = torch.empty(packed_size(x, n), dtype=torch.uint8, device=x.device)
    flags = packed[form.rows * _row_bytes(form, bits) :]
    _forward_kernel[form.grid](
        source, y, packed, flags, *_channel_tables(norm, act, source), table.scale_in, table.thresholds,
        table.outputs, form.rows, form.channels, form.tiles, n, _row_bytes(form, bits),
        NORM=norm is not None, ACT=act is not None, HELD=held_bounds(n), BITS=bits,
        COLUMNS=form.columns, TILE=form.tile, enable_fp_fusion=False,
    )  # fmt: skip
    return y, packed, stats


def _channel_tables(norm: Norm | None, act: Activation | None, stand_in: Tensor) -> tuple[Tensor, ...]:
    """The norm's table (its rows lie one behind the other), bias, slope, bias; `stand_in` is never read."""
    first = stand_in if norm is None else norm.mean
    return first, *((stand_in,) * 3 if act is None else (p.detach() for p in act))


def rebuild(packed: Tensor, outputs: Tensor, size: list[int], dtype: torch.dtype) -> Tensor:
    """The quantized map from its codes, channels-last; `outputs` is the table `[n + 1]`."""
    n = outputs.numel() - 1
    y = torch.empty(size, dtype=dtype, device=packed.device, memory_format=torch.channels_last)
    form, bits = layout(y, _FORWARD_TILE), stored_bits(n)
    flags = packed[form.rows * _row_bytes(form, bits) :]
    _rebuild_kernel[form.grid](
        packed, flags, outputs, y, form.rows, form.channels, form.tiles, _row_bytes(form, bits),
        BITS=bits, COLUMNS=form.columns, TILE=form.tile,
    )  # fmt: skip
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    norm_parameters: tuple[Tensor, Tensor] | None,
    eps: float,
    act: Activation | None,
    quantizer: _QUANTIZER,
) -> list[Tensor]:
    """Gradients of the input, the norm's two parameters, the activation's three, the quantizer's four."""
    source, grad, n = channels_last(x), channels_last(grad), quantizer[1].numel()
    norm = None if norm_parameters is None else known_norm(stats, *norm_parameters, eps)
    table = tables(*quantizer, torch.float32, 0.0)
    dx, held = empty_map(x, x.dtype), held_bounds(n)
    form = layout(source, BACKWARD_TILE)
    sums = _new(form, 4, form.channels, like=source)
    segments = torch.empty(form.grid[0] * form.grid[1], n + 2, 2, dtype=torch.float64, device=x.device)
    channel_tables, beta = _channel_tables(norm, act, source), quantizer[3].detach()
    _sums_kernel[form.grid](
        grad, source, dx, sums, segments, *channel_tables, table.scale_in, beta, table.knots,
        table.slopes, table.thresholds, table.levels, form.rows, form.channels, form.tiles, n,
        NORM=norm is not None, ACT=act is not None, HELD=held, COLUMNS=form.columns, TILE=form.tile,
        enable_fp_fusion=False,
    )  # fmt: skip
    total = segments.sum(0)
    grads = channel_gradients(sums, norm, norm_parameters, act, form)
    correction, channel_grads = grads[0], grads[1:]
    if norm is not None:
        form = layout(source, _FORWARD_TILE)
        _input_kernel[form.grid](
            grad, source, dx, correction, *channel_tables, table.scale_in, beta, table.knots, table.slopes,
            form.rows, form.channels, form.tiles, n, ACT=act is not None, HELD=held, COLUMNS=form.columns,
            TILE=form.tile, enable_fp_fusion=False,
        )  # fmt: skip
    return [dx, *channel_grads, *parameter_gradients(total, total[0, 0], *quantizer)]


def _new(form: Layout, *shape: int, like: Tensor) -> Tensor:
    return torch.empty(form.grid[0], *shape, dtype=torch.float64, device=like.device)


def channel_gradients(
    sums: Tensor,
    norm: Norm | None,
    norm_parameters: tuple[Tensor, Tensor] | None,
    act: Activation | None,
    form: Layout,
) -> list[Tensor]:
    """The norm's corrections `[2, C]`, then the gradients of those parameters that there are.

    Args:
        sums: `[programs, 4, C]`, as the kernels leave them.
        norm: the norm, if any.
        norm_parameters: `gamma, beta`, if any.
        act: bias, slope, bias, if any.
        form: of the map.
    """
    correction = torch.empty(2, form.channels, dtype=torch.float32, device=sums.device)
    parameters = [*(norm_parameters or ()), *(act or ())]
    grads = [torch.empty_like(p) for p in parameters]
    if not parameters:
        return [correction]
    norm_grads = grads[:2] if norm is not None else [correction] * 2
    act_grads = grads[-3:] if act is not None else [correction] * 3
    _channels_kernel[(triton.cdiv(form.channels, 128),)](
        sums.sum(0), correction if norm is None else norm.mean, correction, *norm_grads, *act_grads,
        form.rows, form.channels, NORM=norm is not None, ACT=act is not None, TILE=128,
        enable_fp_fusion=False,
    )  # fmt: skip
    return [correction, *grads]
