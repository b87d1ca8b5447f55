"""Steps of integer-only networks: maps between layers that are 8-bit integers, their sums and their pooling.

Their values are signed where the trained map has both signs. The steps that a grid multiplies them with wait
until a quantizer takes them over (`lower/grids.py`); none is ever carried out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_n2uq.export.ir.steps import Codes, MaxPool, Step


@dataclass(frozen=True)
class GridCodes(Codes, op="grid_codes"):
    """`low + #{k : sign * x > thresholds_k}`, int8, or uint8 where `low` is 0.

    `thresholds` and `sign` are those of `Codes`; NaN passes no threshold.
    """

    low: int = -127

    @property
    def high(self) -> int:
        """Largest value."""
        return self.low + self.levels

    @property
    def dtype(self) -> str:
        """Dtype of the values."""
        return "int8" if self.low < 0 else "uint8"


class IntAdd(Step, op="int_add"):
    """Sum of two int8 maps of one step, int32."""


class SumPool(Step, op="sum_pool"):
    """Sum over height and width of a map of small integers, int32, `[N, C, H, W]` to `[N, C, 1, 1]`."""


class IntMaxPool(MaxPool, op="int_max_pool"):
    """`MaxPool` of uint8 codes; the surroundings count as 0."""


def count_passed(x: NDArray[np.generic], thresholds: NDArray[np.generic]) -> NDArray[np.int64]:
    """Returns how many of the thresholds `[1, n]` or `[C, n]` each value of `x` `[N, C, ..]` passes."""
    rows = [np.searchsorted(thresholds[c % len(thresholds)], x[:, c]) for c in range(x.shape[1])]
    counts: NDArray[np.int64] = np.stack(rows, 1)
    return np.where(np.isnan(x), 0, counts) if np.issubdtype(x.dtype, np.floating) else counts
