# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton kernels of the fused pre-activation chain on channels-last maps: norm, bias, PReLU, bias, quantizer.

Forward: one pass for the norm's statistics, one that writes the quantized map and its codes. Backward: one
pass for all sums, and behind a norm, which needs the sums first, one more for the input's gradient; the codes
save it the search, since a code leaves one knot to compare with. What lies outside a map has no gradient, and
so adds nothing to any sum. Nothing waits for the device, and no intermediate is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_n2uq.ops.backends.triton.channels import (
    Layout,
    channel_gradients,
    channels_last,
    empty_map,
    first_row,
    known_norm,
    layout,
    measured_norm,
    normed,
    ordered,
    per_channel,
    place,
    prelu,
    store_column_sums,
)
from lightning_n2uq.ops.backends.triton.codes import (
    codes_for_backward,
    empty_rebuilt,
    load_codes,
    packed_shape,
    pixel_bytes,
    place_bytes,
    rebuild,
    stored_bits,
    tables_of,
)
from lightning_n2uq.ops.backends.triton.positions import (
    LAUNCH,
    UNSPECIALIZED,
    add_group,
    add_products,
    add_values,
    count_below,
    count_below_fifteen,
    flat_to_zero,
    held_bounds,
    index_of,
    join4,
    load_bounds,
    load_pivots,
    load_shares,
    split4,
    store_climbs,
    total,
)
from lightning_n2uq.ops.backends.triton.tables import (
    BY_CODE,
    CLIMBS,
    OUTPUTS,
    THRESHOLDS,
    empty_sums,
    fill_tables,
    parameter_gradients,
    record,
)
from lightning_n2uq.ops.formats.fused_activation import ActivationGradients, NormParameters, PReLUParameters
from lightning_n2uq.ops.tables import QuantizerParameters
from lightning_n2uq.utils.validation import check

__all__ = [
    "backward",
    "codes_for_backward",
    "empty_map",
    "empty_rebuilt",
    "forward",
    "ordered",
    "packed_shape",
    "rebuild",
]

MOST_BITS = 4  # of a quantizer on the fused path
_CLIMBS = tl.constexpr(CLIMBS)


@triton.jit
def _channel_numbers(
    norm_ptr, bias_in_ptr, slope_ptr, bias_out_ptr, channel, known, channels,
    NORM: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Mean, scale, shift, bias, slope, bias of every value's channel; what is not there is not used."""
    zero = tl.zeros(channel.shape, tl.float32)
    mean, scale, shift, bias_in, slope, bias_out = zero, zero, zero, zero, zero, zero
    if NORM:
        mean = per_channel(norm_ptr, channel, known)
        scale = per_channel(norm_ptr + 2 * channels, channel, known)
        shift = per_channel(norm_ptr + 3 * channels, channel, known)
    if ACT:
        bias_in = per_channel(bias_in_ptr, channel, known)
        slope = per_channel(slope_ptr, channel, known)
        bias_out = per_channel(bias_out_ptr, channel, known)
    return mean, scale, shift, bias_in, slope, bias_out


@triton.jit
def _chain(x, scale, shift, bias_in, slope, bias_out, NORM: tl.constexpr, ACT: tl.constexpr):
    """What PReLU sees, and what the quantizer sees; see `reference.fused_activation.chain`."""
    u = normed(x, scale, shift, NORM)
    v = u
    if ACT:
        u = u + bias_in
        v = prelu(u, slope, bias_out)
    return u, v


@triton.jit
def _code(s, held, low, middle, high, bounds_ptr, N: tl.constexpr, HELD: tl.constexpr):
    """How many of the thresholds are below `s`."""
    if N == 15:
        code = count_below_fifteen(s, low, middle, high, bounds_ptr)
    else:
        code = index_of(count_below(s, held, bounds_ptr, N, HELD, 1))
    return code


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    x_ptr, y_ptr, packed_ptr, norm_ptr, bias_in_ptr, slope_ptr, bias_out_ptr, tables_ptr,
    rows, channels, tiles, row_bytes,
    NORM: tl.constexpr, ACT: tl.constexpr, N: tl.constexpr, HELD: tl.constexpr, BITS: tl.constexpr,
    COLUMNS: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """Quantized values, packed codes and the NaN flag of one program."""
    channel, known, row, offset = place(channels, COLUMNS, LANES)
    byte_row, column, there = place_bytes(channels, row_bytes, BITS, COLUMNS, LANES)
    _, scale, shift, bias_in, slope, bias_out = _channel_numbers(
        norm_ptr, bias_in_ptr, slope_ptr, bias_out_ptr, channel, known, channels, NORM, ACT
    )
    alpha = tl.load(tables_ptr)
    bounds_ptr, outputs_ptr = tables_ptr + THRESHOLDS * (N + 2), tables_ptr + OUTPUTS * (N + 2)
    held = load_bounds(bounds_ptr, 0, N, HELD)
    low, middle, high = load_pivots(bounds_ptr)
    nans = tl.zeros([LANES, 4], tl.int32)
    for tile in range(tiles):
        begin = first_row(tile, tiles, COLUMNS, LANES)
        inside = known & (row < rows - begin)
        x = tl.load(x_ptr + begin * channels + offset, mask=inside, other=0.0).to(tl.float32)
        _, v = _chain(x, scale, shift, bias_in, slope, bias_out, NORM, ACT)
        s = v * alpha
        s0, s1, s2, s3 = split4(s)
        c0 = _code(s0, held, low, middle, high, bounds_ptr, N, HELD)
        c1 = _code(s1, held, low, middle, high, bounds_ptr, N, HELD)
        c2 = _code(s2, held, low, middle, high, bounds_ptr, N, HELD)
        c3 = _code(s3, held, low, middle, high, bounds_ptr, N, HELD)
        y = tl.where(s != s, s, tl.load(outputs_ptr + join4(c0, c1, c2, c3)))
        tl.store(y_ptr + begin * channels + offset, y.to(y_ptr.dtype.element_ty), mask=inside)
        nans |= (inside & (s != s)).to(tl.int32)
        word = c0 | (c1 << BITS) | (c2 << (2 * BITS)) | (c3 << (3 * BITS))
        byte = tl.join(word & 255, word >> 8) if BITS == 4 else word[:, None]
        mask = there & (byte_row < rows - begin)
        target = packed_ptr + begin * row_bytes + byte_row * row_bytes + column
        tl.store(target, byte.to(tl.uint8), mask=mask)
    flag = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    flags_ptr = packed_ptr + rows.to(tl.int64) * row_bytes
    tl.store(flags_ptr + flag, tl.max(tl.max(nans, axis=1), axis=0).to(tl.uint8))


@triton.jit
def _slope_and_level(s, code, tables_ptr, N: tl.constexpr):
    """The surrogate's slope at `s` and its level.

    Of the knots, one lies between the thresholds around a code: those before it are passed, those behind not.
    """
    knot, level, slope, slope_above = record(tables_ptr + BY_CODE * (N + 2), code)
    return tl.where(s > knot, slope_above, slope), level


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sums_kernel(
    grad_ptr, x_ptr, packed_ptr, dx_ptr, sums_ptr, climbs_ptr, norm_ptr, bias_in_ptr, slope_ptr,
    bias_out_ptr, tables_ptr, rows, channels, tiles, row_bytes,
    NORM: tl.constexpr, ACT: tl.constexpr, N: tl.constexpr, HELD: tl.constexpr, BITS: tl.constexpr,
    COLUMNS: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """All sums of one program, and without a norm the input's gradient.

    `sums` `[programs along rows, 4, C]` are those of `reference.fused_activation.backward`; `climbs`
    `[programs, CLIMBS + N]` those of `tables`.
    """
    channel, known, row, offset = place(channels, COLUMNS, LANES)
    byte_row, column, there = place_bytes(channels, row_bytes, BITS, COLUMNS, LANES)
    mean, scale, shift, bias_in, slope, bias_out = _channel_numbers(
        norm_ptr, bias_in_ptr, slope_ptr, bias_out_ptr, channel, known, channels, NORM, ACT
    )
    alpha = tl.load(tables_ptr)
    gain = alpha * tl.load(tables_ptr + 1)
    inverse, shift_of = load_shares(tables_ptr, 0, N, HELD, LANES)
    climbs = tl.zeros([HELD, LANES], tl.float32)
    none, zero = tl.zeros([LANES], tl.float32), tl.zeros([LANES, 4], tl.float32)
    value_sum, pull_sum, pull_v_sum = none, none, none
    bias_sum, slope_sum, out_sum, moment = zero, zero, zero, zero
    for tile in range(tiles):
        begin = first_row(tile, tiles, COLUMNS, LANES)
        inside = known & (row < rows - begin)
        x = tl.load(x_ptr + begin * channels + offset, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + begin * channels + offset, mask=inside, other=0.0).to(tl.float32)
        code = load_codes(packed_ptr, begin, rows, byte_row, column, there, row_bytes, BITS)
        u, v = _chain(x, scale, shift, bias_in, slope, bias_out, NORM, ACT)
        s = v * alpha
        climb, value = _slope_and_level(s, code, tables_ptr, N)
        g = tl.where(s != s, s, g)  # a NaN input reaches every sum
        pull = g * climb
        climbs = add_group(climbs, pull, s, inverse, shift_of)
        value_sum = add_products(value_sum, g, value)
        pull_sum = add_values(pull_sum, pull)
        pull_v_sum = add_products(pull_v_sum, pull, flat_to_zero(pull, v))
        d = g * (climb * gain)
        if ACT:
            out_sum += d
            slope_sum += d * tl.minimum(u, 0.0)
            d = tl.where(u > 0, d, d * slope)
        if ACT or NORM:
            bias_sum += d
        if NORM:
            moment += d * (x - mean)
        else:
            tl.store(dx_ptr + begin * channels + offset, d.to(dx_ptr.dtype.element_ty), mask=inside)
    if ACT or NORM:
        store_column_sums(sums_ptr, 0, 4, bias_sum, channels, COLUMNS)
        store_column_sums(sums_ptr, 1, 4, slope_sum, channels, COLUMNS)
        store_column_sums(sums_ptr, 2, 4, out_sum, channels, COLUMNS)
        store_column_sums(sums_ptr, 3, 4, moment, channels, COLUMNS)
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    mine_ptr = climbs_ptr + program * (_CLIMBS + N)
    store_climbs(mine_ptr, climbs, 0, N, HELD)
    tl.store(mine_ptr, total(value_sum))
    tl.store(mine_ptr + 1, total(pull_sum))
    tl.store(mine_ptr + 2, total(pull_v_sum))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _input_kernel(
    grad_ptr, x_ptr, packed_ptr, dx_ptr, correction_ptr, norm_ptr, bias_in_ptr, slope_ptr, bias_out_ptr,
    tables_ptr, rows, channels, tiles, row_bytes,
    ACT: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """The input's gradient behind a norm; `correction` is `[2, C]`, see `reference`'s `norm_gradient`."""
    channel, known, row, offset = place(channels, COLUMNS, LANES)
    byte_row, column, there = place_bytes(channels, row_bytes, BITS, COLUMNS, LANES)
    mean, scale, shift, bias_in, slope, bias_out = _channel_numbers(
        norm_ptr, bias_in_ptr, slope_ptr, bias_out_ptr, channel, known, channels, True, ACT
    )
    common = per_channel(correction_ptr, channel, known)
    tilt = per_channel(correction_ptr + channels, channel, known)
    alpha = tl.load(tables_ptr)
    gain = alpha * tl.load(tables_ptr + 1)
    for tile in range(tiles):
        begin = first_row(tile, tiles, COLUMNS, LANES)
        inside = known & (row < rows - begin)
        x = tl.load(x_ptr + begin * channels + offset, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + begin * channels + offset, mask=inside, other=0.0).to(tl.float32)
        code = load_codes(packed_ptr, begin, rows, byte_row, column, there, row_bytes, BITS)
        u, v = _chain(x, scale, shift, bias_in, slope, bias_out, True, ACT)
        s = v * alpha
        climb, _ = _slope_and_level(s, code, tables_ptr, N)
        d = tl.where(s != s, s, g) * (climb * gain)
        if ACT:
            d = tl.where(u > 0, d, d * slope)
        d = (d - common - (x - mean) * tilt) * scale
        tl.store(dx_ptr + begin * channels + offset, d.to(dx_ptr.dtype.element_ty), mask=inside)


def forward(
    x: Tensor,
    norm: NormParameters | None,
    act: PReLUParameters | None,
    quantizer: QuantizerParameters,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the map in `dtype`, channels-last, its codes as one run of bytes, and the statistics."""
    check(dtype.is_floating_point, "dtype", dtype, "is a floating one on CUDA")
    source, n = channels_last(x), quantizer.widths.numel()
    stats, known = torch.empty(2, 0, dtype=torch.float32, device=x.device), None
    if norm is not None:
        stats, known = measured_norm(source, *norm)
    form, y = layout(source), empty_map(x, dtype)
    packed = torch.empty(packed_shape(x, n.bit_length()), dtype=torch.uint8, device=x.device)
    tables = tables_of(packed, n)
    fill_tables(tables, quantizer)
    _forward_kernel[form.grid](source, y, packed, *_channel_tables(known, act, source), tables,
        *_sizes(form, n), NORM=known is not None, ACT=act is not None,
        N=n, HELD=held_bounds(n), BITS=stored_bits(n), COLUMNS=form.columns, **LAUNCH,
    )  # fmt: skip
    return y, packed, stats


def _channel_tables(norm: Tensor | None, act: PReLUParameters | None, stand_in: Tensor) -> tuple[Tensor, ...]:
    """Returns the norm, bias, slope, bias; `stand_in` is never read."""
    return stand_in if norm is None else norm, *(p.detach() for p in act or (stand_in,) * 3)


def _sizes(form: Layout, n: int) -> tuple[int, int, int, int]:
    return form.rows, form.channels, form.tiles, pixel_bytes(form, n)


def _resident(n: int, norm: bool) -> int:
    """Returns how many programs of `_sums_kernel` have registers on a multiprocessor."""
    if n > 3:
        return 4
    return 5 if norm else 7


def backward(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    stats: Tensor,
    norm: NormParameters | None,
    act: PReLUParameters | None,
    quantizer: QuantizerParameters,
) -> ActivationGradients:
    """Returns all gradients; that of the map is channels-last. `packed` is the forward pass's."""
    source, grad, n = channels_last(x), channels_last(grad), quantizer.widths.numel()
    known = None if norm is None else known_norm(stats, *norm)
    dx, form = empty_map(x, x.dtype), layout(source, resident=_resident(n, known is not None))
    sums = torch.empty(form.grid[0], 4, form.channels, dtype=torch.float64, device=x.device)
    climbs = empty_sums(form.grid[0] * form.grid[1], n, x.device)
    tables = *_channel_tables(known, act, source), tables_of(packed, n)
    shape = {"ACT": act is not None, "N": n, "BITS": stored_bits(n), "COLUMNS": form.columns, **LAUNCH}
    _sums_kernel[form.grid](grad, source, packed, dx, sums, climbs, *tables, *_sizes(form, n),
        NORM=known is not None, HELD=held_bounds(n), **shape,
    )  # fmt: skip
    correction, grads = channel_gradients(sums, known, norm, act, form.rows)
    if known is not None:
        form = layout(source)
        _input_kernel[form.grid](grad, source, packed, dx, correction, *tables, *_sizes(form, n), **shape)
    return ActivationGradients(dx, *grads, *parameter_gradients(climbs, quantizer))
