"""Channels-last maps as rows: their units of work, and the format of their packed codes.

A map `[N, C, H, W]` in channels-last memory is one run of `N H W` rows of `C` values. It is cut into units of
up to `UNIT` values: as many whole rows as fit, or equal parts of a row that is longer. So every value of a
unit keeps its place in the tables of the channels, repeated to a period of whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

UNIT = 512  # values: a handful of such buffers stay in the first-level cache
FOLD = 4  # rows that are added up before they are added to sums
DTYPES = (torch.float32, torch.bfloat16)  # that kernels read and write as they are
_CHUNK = 32768  # values that share their sums: clearing and adding them up costs as much as hundreds
_MOST_CHUNKS = 64  # bounds the memory of the sums


class Units(NamedTuple):
    """How a map is cut.

    Attributes:
        period: Values of whole rows that the units repeat after, a multiple of the channels.
        size: Values of a unit; the last of a period or of the map may have fewer.
        parts: Units of a period.
        fold: A quarter of a unit, where that is whole rows, or 0: four rows are added before their sums grow.
    """

    period: int
    size: int
    parts: int
    fold: int

    def number(self, numel: int) -> int:
        """Returns the units of a map of `numel` values, which are whole rows."""
        return -(-numel // self.period) * self.parts

    def chunks(self, numel: int) -> tuple[int, int]:
        """Returns number and units of the chunks: by the shape alone, so that threads change no bit."""
        values = max(_CHUNK, -(-numel // _MOST_CHUNKS))
        periods = -(-values // self.period)
        return -(-numel // (periods * self.period)), periods * self.parts


def units(channels: int) -> Units:
    """Returns how maps of that many channels are cut."""
    if channels <= UNIT:
        number = UNIT // channels
        period = (number // FOLD * FOLD or number) * channels
        return Units(period, period, 1, period // FOLD if number >= FOLD else 0)
    parts = -(-channels // UNIT)
    size = -(-channels // parts)
    return Units(channels, size, -(-channels // size), 0)


def is_rows(x: Tensor) -> bool:
    """Returns whether a map is worked on as rows: channels-last, where that is another order."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def rows(x: Tensor) -> Tensor:
    """Returns a map `[N, C, H, W]` as contiguous `[N H W, C]` in one of `DTYPES`, a view where possible."""
    x = x.detach() if x.dtype in DTYPES else x.detach().float()
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


def from_rows(x: Tensor, size: Sequence[int]) -> Tensor:
    """Returns rows as a channels-last map of that size."""
    batch, channels, height, width = size
    return x.view(batch, height, width, channels).permute(0, 3, 1, 2)


def packed_shape(numel: int, channels: int, bits: int) -> list[int]:
    """Returns the shape of packed codes: every unit's bit planes as of a plane, and a flag for NaN."""
    form = units(channels)
    return [form.number(numel), bits * -(-form.size // 8) + 1]
