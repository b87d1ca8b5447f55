# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton: maps in channels-last order as rows of channels, and the batch norm of such a map.

On a GPU the fused operators work on channels-last maps, which the fast half-precision convolutions want too;
others are copied into that order once. A program takes a block of columns (channels) and a run of tiles of
rows; a thread stays with its channels for the whole run, so that their parameters are loaded once and their
sums stay in registers, in float32. Programs leave float64 partial sums, which are added in fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_n2uq.ops.packed_format import Norm

_MOST_COLUMNS = 64
_PROGRAMS = 1056  # 8 for each of 132 multiprocessors; a fixed number keeps the order of additions


class Layout(NamedTuple):
    """How the programs of a kernel share a map.

    Attributes:
        rows: `N * P`.
        channels: `C`.
        columns: channels of a program, a power of two.
        tile: values of a tile, a multiple of `columns`.
        tiles: tiles of a program.
        grid: programs along rows and along channels.
    """

    rows: int
    channels: int
    columns: int
    tile: int
    tiles: int
    grid: tuple[int, int]


def layout(x: Tensor, tile: int) -> Layout:
    """The layout of a map `[N, C, ...]` for tiles of at least `tile` values, a power of two."""
    channels = x.shape[1]
    rows = x.numel() // channels
    columns = min(_MOST_COLUMNS, int(triton.next_power_of_2(channels)))
    blocks = triton.cdiv(channels, columns)
    number = triton.cdiv(rows, tile // columns)
    tiles = triton.cdiv(number, max(1, _PROGRAMS // blocks))
    return Layout(rows, channels, columns, tile, tiles, (triton.cdiv(number, tiles), blocks))


def channels_last(x: Tensor) -> Tensor:
    """`x` `[N, C, H, W]` in channels-last order, detached."""
    return x.detach().contiguous(memory_format=torch.channels_last)


def empty_map(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty channels-last map of the shape of `x`."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)


@triton.jit
def place(channels, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """Of every value of a program's tile: channel, whether there is one, row within the tile, offset."""
    lane = tl.arange(0, TILE)
    channel = tl.program_id(1) * COLUMNS + lane % COLUMNS
    row = lane // COLUMNS
    return channel, channel < channels, row, row * channels + channel


@triton.jit
def first_row(tile, tiles, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """First row of a program's tile."""
    return (tl.program_id(0).to(tl.int64) * tiles + tile) * (TILE // COLUMNS)


@triton.jit
def per_channel(ptr, channel, known):
    """A parameter of every value's channel, float32."""
    return tl.load(ptr + channel, mask=known, other=0.0).to(tl.float32)


@triton.jit
def store_column_sums(sums_ptr, kind, KINDS: tl.constexpr, value, channels, COLUMNS: tl.constexpr) -> None:
    """Writes the sums over a program's rows to `sums` `[programs, KINDS, C]`, float64."""
    rows: tl.constexpr = value.shape[0] // COLUMNS
    total = tl.sum(tl.reshape(value.to(tl.float64), [rows, COLUMNS]), axis=0)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    base = (tl.program_id(0).to(tl.int64) * KINDS + kind) * channels
    tl.store(sums_ptr + base + channel, total, mask=channel < channels)


@triton.jit
def _moments_kernel(
    x_ptr, sums_ptr, rows, channels, tiles, COLUMNS: tl.constexpr, TILE: tl.constexpr
) -> None:
    """Sums of `x - x[0]` and of its squares: the first value stands in for the mean, so that none is lost."""
    channel, known, row, offset = place(channels, COLUMNS, TILE)
    origin = per_channel(x_ptr, channel, known)
    total, squares = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for tile in range(tiles):
        begin = first_row(tile, tiles, COLUMNS, TILE)
        inside = known & (row < rows - begin)
        x = tl.load(x_ptr + begin * channels + offset, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - origin, 0.0)
        total += centred
        squares += centred * centred
    store_column_sums(sums_ptr, 0, 2, total, channels, COLUMNS)
    store_column_sums(sums_ptr, 1, 2, squares, channels, COLUMNS)


@triton.jit
def _norm_kernel(
    x_ptr, sums_ptr, gamma_ptr, beta_ptr, stats_ptr, norm_ptr, rows, channels, eps,
    FROM_SUMS: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """`stats` `[2, C]` from the sums (or as they are), and `packed_format.batch_norm` of them `[4, C]`."""
    channel = tl.program_id(0) * TILE + tl.arange(0, TILE)
    known = channel < channels
    if FROM_SUMS:
        total = tl.load(sums_ptr + channel, mask=known, other=0.0) / rows
        squares = tl.load(sums_ptr + channels + channel, mask=known, other=0.0) / rows
        origin = per_channel(x_ptr, channel, known).to(tl.float64)
        mean = (origin + total).to(tl.float32)
        spread = squares - total * total
        variance = tl.where(spread < 0, 0.0, spread).to(tl.float32)
        tl.store(stats_ptr + channel, mean, mask=known)
        tl.store(stats_ptr + channels + channel, variance, mask=known)
    else:
        mean = tl.load(stats_ptr + channel, mask=known, other=0.0)
        variance = tl.load(stats_ptr + channels + channel, mask=known, other=1.0)
    inverse = (1.0 / tl.sqrt(variance.to(tl.float64) + eps)).to(tl.float32)
    scale = per_channel(gamma_ptr, channel, known) * inverse
    shift = per_channel(beta_ptr, channel, known) - mean * scale
    tl.store(norm_ptr + channel, mean, mask=known)
    tl.store(norm_ptr + channels + channel, inverse, mask=known)
    tl.store(norm_ptr + 2 * channels + channel, scale, mask=known)
    tl.store(norm_ptr + 3 * channels + channel, shift, mask=known)


def measured_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Norm]:
    """Mean and biased variance `[2, C]` float32 of a channels-last map, and its norm."""
    form = layout(x, 1024)
    partial = torch.empty(form.grid[0], 2, form.channels, dtype=torch.float64, device=x.device)
    _moments_kernel[form.grid](
        x, partial, form.rows, form.channels, form.tiles, COLUMNS=form.columns, TILE=form.tile,
        enable_fp_fusion=False,
    )  # fmt: skip
    stats = torch.empty(2, form.channels, dtype=torch.float32, device=x.device)
    return stats, _norm(x, partial.sum(0), stats, gamma, beta, eps)


def known_norm(stats: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Norm:
    """The norm of statistics that `measured_norm` has returned: the very same numbers."""
    return _norm(stats, None, stats, gamma, beta, eps)


def _norm(x: Tensor, sums: Tensor | None, stats: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Norm:
    channels = stats.shape[1]
    norm = torch.empty(4, channels, dtype=torch.float32, device=stats.device)
    _norm_kernel[(triton.cdiv(channels, 128),)](
        x, stats if sums is None else sums, gamma.detach(), beta.detach(), stats, norm,
        x.numel() // channels, channels, eps, FROM_SUMS=sums is not None, TILE=128, enable_fp_fusion=False,
    )  # fmt: skip
    return Norm(*norm.unbind(0))
