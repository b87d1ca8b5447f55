# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton: maps in channels-last order as rows of channels, and the batch norm of such a map.

On a GPU the fused operators work on channels-last maps, which the fast half-precision convolutions want too;
others are copied into that order once. A program takes a block of columns (channels) and a run of tiles of
rows; a thread stays with its four channels for the whole run, so that their parameters are loaded once and
their sums stay in registers, in float32. Programs leave float64 partial sums; the kernels that use them add
them up in fixed order, which saves a launch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_n2uq.ops.backends.triton.positions import GROUP, LANES, LAUNCH, MULTIPROCESSORS, UNSPECIALIZED
from lightning_n2uq.ops.backends.triton.product import FUSED, product
from lightning_n2uq.ops.formats.fused_activation import ChannelGradients, NormParameters, PReLUParameters

_MOST_COLUMNS = 64
_SUMMED_CHANNELS = 8  # that a finishing program adds up, 256 rows at a time
_FINISH = {"SUMMED": 256, "CHANNELS": _SUMMED_CHANNELS, "num_warps": 8, **FUSED}


class Layout(NamedTuple):
    """How the programs of a kernel share a map.

    Attributes:
        rows: `N * P`.
        channels: `C`.
        columns: Channels of a program, a power of two, those of a thread at least.
        tiles: Tiles of a program, `LANES` threads each.
        grid: Programs along rows and along channels.
    """

    rows: int
    channels: int
    columns: int
    tiles: int
    grid: tuple[int, int]


def layout(x: Tensor, group: int = GROUP, resident: int = 8) -> Layout:
    """Returns how programs share a map `[N, C, ...]`.

    Args:
        x: The map.
        group: Number of neighbouring channels of a thread.
        resident: Programs of a multiprocessor: as many as its registers hold, so that none waits for a second
            round and runs it almost alone (`python -m benchmarks.instructions` tells the registers).
    """
    channels = x.shape[1]
    rows = x.numel() // channels
    columns = min(_MOST_COLUMNS, max(group, int(triton.next_power_of_2(channels))))
    blocks = -(-channels // columns)
    number = -(-rows // (LANES * group // columns))
    tiles = -(-number // max(1, resident * MULTIPROCESSORS // blocks))
    return Layout(rows, channels, columns, tiles, (-(-number // tiles), blocks))


def channels_last(x: Tensor) -> Tensor:
    """Returns `x` `[N, C, H, W]` in channels-last order, detached."""
    return x.detach().contiguous(memory_format=torch.channels_last)


def ordered(x: Tensor, like: Tensor) -> Tensor:
    """Returns a map of another operator in channels-last order; `like` is its input."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_map(x: Tensor, dtype: torch.dtype, size: Sequence[int] | None = None) -> Tensor:
    """Returns an empty channels-last map of that size, which None says is that of `x`."""
    size = x.shape if size is None else size
    return torch.empty(size, dtype=dtype, device=x.device, memory_format=torch.channels_last)


@triton.jit
def place(channels, COLUMNS: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr = 4):
    """Of every value of a program's tile: channel, whether there is one, row within the tile, offset.

    All are `[LANES, GROUP]`, but the row is the same for a thread's values, `[LANES, 1]`.
    """
    lane = tl.arange(0, LANES)[:, None] * GROUP
    column = tl.multiple_of(lane % COLUMNS, [GROUP, GROUP])  # Triton 3.6 does not see it itself
    channel = tl.program_id(1) * COLUMNS + column + tl.arange(0, GROUP)[None, :]
    row = lane // COLUMNS
    return channel, channel < channels, row, row * channels + channel


@triton.jit
def first_row(tile, tiles, COLUMNS: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr = 4):
    """First row of a program's tile."""
    return (tl.program_id(0).to(tl.int64) * tiles + tile) * (LANES * GROUP // COLUMNS)


@triton.jit
def per_channel(ptr, channel, known):
    """A parameter of every value's channel, float32."""
    return tl.load(ptr + channel, mask=known, other=0.0).to(tl.float32)


@triton.jit
def normed(x, scale, shift, NORM: tl.constexpr):
    """The norm as one product and one sum, rounded each."""
    if NORM:
        x = product(x, scale) + shift
    return x


@triton.jit
def prelu(u, slope, bias):
    """PReLU and the bias behind it."""
    return tl.where(u > 0, u, product(slope, u)) + bias


@triton.jit
def store_column_sums(sums_ptr, kind, KINDS: tl.constexpr, value, channels, COLUMNS: tl.constexpr) -> None:
    """Writes the sums over a program's rows to `sums` `[programs, KINDS, C]`, float64."""
    rows: tl.constexpr = value.shape[0] * 4 // COLUMNS
    total = tl.sum(tl.reshape(value.to(tl.float64), [rows, COLUMNS]), axis=0)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    base = (tl.program_id(0).to(tl.int64) * KINDS + kind) * channels
    tl.store(sums_ptr + base + channel, total, mask=channel < channels)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _moments_kernel(
    x_ptr, sums_ptr, rows, channels, tiles, COLUMNS: tl.constexpr, LANES: tl.constexpr
) -> None:
    """Sums of `x - x[0]` and of its squares: the first value stands in for the mean, so that none is lost."""
    channel, known, row, offset = place(channels, COLUMNS, LANES)
    origin = per_channel(x_ptr, channel, known)
    total, squares = tl.zeros([LANES, 4], tl.float32), tl.zeros([LANES, 4], tl.float32)
    for tile in range(tiles):
        begin = first_row(tile, tiles, COLUMNS, LANES)
        inside = known & (row < rows - begin)
        x = tl.load(x_ptr + begin * channels + offset, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - origin, 0.0)
        total += centred
        squares += centred * centred
    store_column_sums(sums_ptr, 0, 2, total, channels, COLUMNS)
    store_column_sums(sums_ptr, 1, 2, squares, channels, COLUMNS)


@triton.jit
def _rows_of(
    sums_ptr, first, programs, kind, KINDS: tl.constexpr, channel, known, channels, SUMMED: tl.constexpr
):
    """One kind of the partial sums `[programs, KINDS, C]`: `SUMMED` rows of them from `first` on."""
    row = first + tl.arange(0, SUMMED)
    place = (row[:, None] * KINDS + kind) * channels + channel[None, :]
    return tl.load(sums_ptr + place, mask=(row < programs)[:, None] & known[None, :], other=0.0)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "programs"])
def _norm_kernel(
    x_ptr, sums_ptr, programs, gamma_ptr, beta_ptr, stats_ptr, norm_ptr, rows, channels, eps,
    FROM_SUMS: tl.constexpr, SUMMED: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """`stats` `[2, C]` from the sums (or as they are), and the norm `[4, C]` that they give."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    if FROM_SUMS:
        totals = tl.zeros([SUMMED, CHANNELS], tl.float64)
        squares = totals
        for first in range(0, programs, SUMMED):
            totals += _rows_of(sums_ptr, first, programs, 0, 2, channel, known, channels, SUMMED)
            squares += _rows_of(sums_ptr, first, programs, 1, 2, channel, known, channels, SUMMED)
        total, square = tl.sum(totals, axis=0) / rows, tl.sum(squares, axis=0) / rows
        origin = per_channel(x_ptr, channel, known).to(tl.float64)
        mean = (origin + total).to(tl.float32)
        spread = square - total * total
        variance = tl.where(spread < 0, 0.0, spread).to(tl.float32)
        tl.store(stats_ptr + channel, mean, mask=known)
        tl.store(stats_ptr + channels + channel, variance, mask=known)
    else:
        mean = tl.load(stats_ptr + channel, mask=known, other=0.0)
        variance = tl.load(stats_ptr + channels + channel, mask=known, other=1.0)
    inverse = (1.0 / tl.sqrt(variance.to(tl.float64) + eps)).to(tl.float32)
    scale = product(per_channel(gamma_ptr, channel, known), inverse)
    shift = per_channel(beta_ptr, channel, known) - product(mean, scale)
    tl.store(norm_ptr + channel, mean, mask=known)
    tl.store(norm_ptr + channels + channel, inverse, mask=known)
    tl.store(norm_ptr + 2 * channels + channel, scale, mask=known)
    tl.store(norm_ptr + 3 * channels + channel, shift, mask=known)


def measured_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns mean and biased variance `[2, C]` float32 of a channels-last map, and its norm.

    The norm is `[4, C]` float32, the fields of `common.planes.PlaneNorm` as rows.
    """
    form = layout(x)
    partial = torch.empty(form.grid[0], 2, form.channels, dtype=torch.float64, device=x.device)
    sizes = form.rows, form.channels, form.tiles
    _moments_kernel[form.grid](x, partial, *sizes, COLUMNS=form.columns, **LAUNCH)
    stats = torch.empty(2, form.channels, dtype=torch.float32, device=x.device)
    return stats, _norm(x, partial, stats, (gamma, beta, eps), from_sums=True)


def known_norm(stats: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Returns the norm of statistics that `measured_norm` has returned: the very same numbers."""
    return _norm(stats, stats, stats, (gamma, beta, eps), from_sums=False)


def _norm(
    x: Tensor, sums: Tensor, stats: Tensor, parameters: tuple[Tensor, Tensor, float], *, from_sums: bool
) -> Tensor:
    channels = stats.shape[1]
    norm = torch.empty(4, channels, dtype=torch.float32, device=stats.device)
    gamma, beta, eps = parameters
    _norm_kernel[_finishing(channels)](x, sums, len(sums), gamma.detach(), beta.detach(), stats, norm,
        x.numel() // channels, channels, eps, FROM_SUMS=from_sums, **_FINISH,
    )  # fmt: skip
    return norm


def _finishing(channels: int) -> tuple[int]:
    return (-(-channels // _SUMMED_CHANNELS),)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "programs"])
def _channels_kernel(
    sums_ptr, programs, norm_ptr, correction_ptr, d_gamma_ptr, d_beta_ptr, d_bias_in_ptr, d_slope_ptr,
    d_bias_out_ptr, rows, channels,
    NORM: tl.constexpr, ACT: tl.constexpr, SUMMED: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of the channels' parameters, and the norm's two corrections, from sums `[programs, 4, C]`."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    biases = tl.zeros([SUMMED, CHANNELS], tl.float64)
    slopes, outs, moments = biases, biases, biases
    for first in range(0, programs, SUMMED):
        biases += _rows_of(sums_ptr, first, programs, 0, 4, channel, known, channels, SUMMED)
        if ACT:
            slopes += _rows_of(sums_ptr, first, programs, 1, 4, channel, known, channels, SUMMED)
            outs += _rows_of(sums_ptr, first, programs, 2, 4, channel, known, channels, SUMMED)
        if NORM:
            moments += _rows_of(sums_ptr, first, programs, 3, 4, channel, known, channels, SUMMED)
    bias = tl.sum(biases, axis=0)
    if NORM:
        inverse = per_channel(norm_ptr + channels, channel, known).to(tl.float64)
        moment = tl.sum(moments, axis=0)
        tl.store(correction_ptr + channel, (bias / rows).to(tl.float32), mask=known)
        tilt = moment * inverse * inverse / rows
        tl.store(correction_ptr + channels + channel, tilt.to(tl.float32), mask=known)
        tl.store(d_gamma_ptr + channel, (moment * inverse).to(d_gamma_ptr.dtype.element_ty), mask=known)
        tl.store(d_beta_ptr + channel, bias.to(d_beta_ptr.dtype.element_ty), mask=known)
    if ACT:
        slope, out = tl.sum(slopes, axis=0), tl.sum(outs, axis=0)
        tl.store(d_bias_in_ptr + channel, bias.to(d_bias_in_ptr.dtype.element_ty), mask=known)
        tl.store(d_slope_ptr + channel, slope.to(d_slope_ptr.dtype.element_ty), mask=known)
        tl.store(d_bias_out_ptr + channel, out.to(d_bias_out_ptr.dtype.element_ty), mask=known)


def channel_gradients(
    sums: Tensor,
    norm: Tensor | None,
    parameters: NormParameters | None,
    act: PReLUParameters | None,
    rows: int,
) -> tuple[Tensor, ChannelGradients]:
    """Returns the norm's corrections `[2, C]`, and the gradients of those parameters that there are.

    Args:
        sums: `[programs, 4, C]` float64, as the kernels leave them: `fused_activation.backward`'s columns.
            Without an activation the second and third are not read.
        norm: `[4, C]`, or None.
        parameters: The norm's parameters, or None.
        act: PReLU's parameters, or None.
        rows: `N * P`.
    """
    channels = sums.shape[2]
    correction = torch.empty(2, channels, dtype=torch.float32, device=sums.device)
    given = *(parameters or (None, None))[:2], *(act or (None, None, None))
    grads = ChannelGradients(*(None if p is None else torch.empty_like(p) for p in given))
    if parameters is None and act is None:
        return correction, grads
    _channels_kernel[_finishing(channels)](sums, len(sums), correction if norm is None else norm,
        correction, *(correction if g is None else g for g in grads), rows, channels,
        NORM=norm is not None, ACT=act is not None, **_FINISH,
    )  # fmt: skip
    return correction, grads
