# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton: packed codes of channels-last maps, and the map rebuilt from them.

The codes of a pixel's channels are packed one behind the other, 2 or 4 bits each, low bits first (1 bit takes
2, 3 bits take 4). Behind them every program of the forward pass leaves one byte that says whether it has seen
a NaN, which has no code; `rebuild` then gives NaN for all values of that program. Last come the quantizer's
tables, so that neither `rebuild` nor the backward pass makes them again.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_n2uq.ops.backends.triton.channels import Layout, first_row, layout, place
from lightning_n2uq.ops.backends.triton.positions import LAUNCH, UNSPECIALIZED, join4
from lightning_n2uq.ops.backends.triton.tables import OUTPUTS, table_shape

_ALIGNMENT = 16  # bytes, of the tables


def stored_bits(n: int) -> int:
    """Returns the bits of a code 0 .. `n` in memory; beyond 4 the chain stays in separate operators."""
    return 2 if n <= 3 else 4


def pixel_bytes(form: Layout, n: int) -> int:
    """Returns the bytes of a pixel's codes."""
    return -(-form.channels * stored_bits(n) // 8)


def packed_shape(x: Tensor, bits: int) -> list[int]:
    """Returns the bytes of the packed codes of a map `[N, C, H, W]`, and of what lies behind them."""
    form, n = layout(x), 2**bits - 1
    codes = form.rows * pixel_bytes(form, n) + form.grid[0] * form.grid[1]
    return [-(-codes // _ALIGNMENT) * _ALIGNMENT + _table_bytes(n)]


def codes_for_backward(packed: Tensor) -> Tensor:
    """Returns the codes, which save the chain's backward pass a search; a convolution keeps them anyway."""
    return packed


def _table_bytes(n: int) -> int:
    return 4 * math.prod(table_shape(n))


def tables_of(packed: Tensor, n: int) -> Tensor:
    """Returns the tables at the end of packed codes, a view of `table_shape`, float32."""
    return packed[packed.numel() - _table_bytes(n) :].view(torch.float32).view(table_shape(n))


@triton.jit
def place_bytes(channels, row_bytes, BITS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """Of the bytes that hold a thread's four codes: row within the tile, place in the row, whether there."""
    BYTES: tl.constexpr = BITS * 4 // 8
    lane = tl.arange(0, LANES)[:, None] * 4
    first = tl.multiple_of(lane % COLUMNS * BITS // 8, [BYTES, BYTES])  # Triton 3.6 does not see it itself
    column = tl.program_id(1) * (COLUMNS * BITS // 8) + first + tl.arange(0, BYTES)[None, :]
    channel = tl.program_id(1) * COLUMNS + lane % COLUMNS
    return lane // COLUMNS, column, (channel < channels) & (column < row_bytes)


@triton.jit
def load_codes(packed_ptr, begin, rows, byte_row, column, there, row_bytes, BITS: tl.constexpr):
    """Codes `[LANES, 4]` of a tile, from the bytes of `place_bytes`."""
    inside = there & (byte_row < rows - begin)
    byte = tl.load(packed_ptr + begin * row_bytes + byte_row * row_bytes + column, mask=inside, other=0)
    byte = byte.to(tl.int32)
    if BITS == 4:
        low, high = tl.split(byte)
        word = low | (high << 8)
    else:
        word = tl.reshape(byte, [byte.shape[0]])
    MASK: tl.constexpr = (1 << BITS) - 1
    return join4(word & MASK, (word >> BITS) & MASK, (word >> (2 * BITS)) & MASK, (word >> (3 * BITS)) & MASK)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _rebuild_kernel(
    packed_ptr, tables_ptr, y_ptr, rows, channels, tiles, row_bytes,
    N: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """The quantized values of one program from its codes."""
    _, known, row, offset = place(channels, COLUMNS, LANES)
    byte_row, column, there = place_bytes(channels, row_bytes, BITS, COLUMNS, LANES)
    flags_ptr = packed_ptr + rows.to(tl.int64) * row_bytes
    flag = tl.load(flags_ptr + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1))
    for tile in range(tiles):
        begin = first_row(tile, tiles, COLUMNS, LANES)
        inside = known & (row < rows - begin)
        code = load_codes(packed_ptr, begin, rows, byte_row, column, there, row_bytes, BITS)
        y = tl.where(flag > 0, float("nan"), tl.load(tables_ptr + OUTPUTS * (N + 2) + code))
        tl.store(y_ptr + begin * channels + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


def empty_rebuilt(packed: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns an empty channels-last map of that size."""
    return torch.empty(size, dtype=dtype, device=packed.device, memory_format=torch.channels_last)


def rebuild(packed: Tensor, scale_out: Tensor, bits: int, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns the quantized map from its packed codes, channels-last; its levels lie behind the codes."""
    y = torch.empty(size, dtype=dtype, device=packed.device, memory_format=torch.channels_last)
    form, n = layout(y), 2**bits - 1
    _rebuild_kernel[form.grid](packed, tables_of(packed, n), y, form.rows, form.channels, form.tiles,
        pixel_bytes(form, n), N=n, BITS=stored_bits(n), COLUMNS=form.columns, **LAUNCH,
    )  # fmt: skip
    return y
