"""LCQ: a learned companding function around a uniform quantizer.

Yamamoto, "Learnable Companding Quantization for Accurate Low-bit Neural Networks", CVPR 2021, arXiv
2103.07156, sections 3.1 to 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_n2uq.ops.level_table import entries, read_table
from lightning_n2uq.ops.ste import straight_through
from lightning_n2uq.ops.tables import compute_dtype
from lightning_n2uq.quantizers.base import Quantizer
from lightning_n2uq.quantizers.integer_levels import nonzero
from lightning_n2uq.utils.validation import check, check_integer


class LCQ(Quantizer):
    """`clip * f^-1(round(s f(v)) / s)`, `v = clamp(x / clip, 0, 1)`, `s = 2^b - 1`; `f` and the clip learned.

    The compressing function `f` from `[0, 1]` to `[0, 1]` is increasing and linear on `intervals` equal
    pieces, whose heights are `softmax(theta)`; it starts as the identity. Codes are uniform in `f(v)` and
    levels are not: there is no integer arithmetic and no integer export.

    Gradient: of `x`, 1 for `0 <= x <= clip` and 0 outside; of the clip, 1 above it and
    `level / clip - x / clip` inside; of `theta`, that of `f^-1` at the rounded and of `f` at the exact place,
    straight through the rounding. A clip below `STEP_FLOOR` counts as `STEP_FLOOR`, with the same gradient.

    Args:
        bits: The code width, 2 to 8.
        clip_init: The first value of the clip, a positive number.
        intervals: The number of pieces of the companding function, 2 or more (16 in the paper).
    """

    name = "lcq"
    positive = ("clip",)
    lowest = 0.0  # of `x / clip`

    def __init__(self, bits: int = 2, clip_init: float = 2.0, intervals: int = 16) -> None:
        super().__init__(bits)
        check(clip_init > 0, "clip_init", clip_init, "is a positive number")
        self.intervals = check_integer("intervals", intervals, 2)
        self.steps = 2**bits - 1  # of one side
        self.clip = nn.Parameter(torch.tensor([float(clip_init)]))
        self.theta = nn.Parameter(torch.zeros(intervals))

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes `x` (any shape, floating) in float32, or float64 if it has it; same shape and dtype."""
        return self._quantize(x.to(compute_dtype(x.dtype))).to(x.dtype)

    def _quantize(self, x: Tensor) -> Tensor:
        clip = self.bounded("clip").to(x.dtype)
        unit = (x / clip).clamp(self.lowest, 1.0)
        size, sign = unit.detach().abs(), unit.detach().sign()
        place = self._compress(size)  # a function of theta
        levels, slopes = self._expanded(size.dtype)
        index = torch.round(place.detach() * self.steps).nan_to_num(0).long()
        level = read_table(levels, index)
        through = (place - place.detach()) / entries(slopes, index)  # 0, with the gradient
        value = straight_through(unit, (sign * level).detach())
        inside = (size < 1).to(x.dtype)
        learned = sign * inside * (level - level.detach() + through) * clip.detach()
        return value * clip + learned

    def _heights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns the pieces' slopes and the function's values at their left ends."""
        heights = torch.softmax(self.theta.to(dtype), 0)
        return heights * self.intervals, heights.cumsum(0) - heights

    def _compress(self, size: Tensor) -> Tensor:
        """Returns `f(size)`, for sizes from 0 to 1."""
        slopes, starts = self._heights(size.dtype)
        piece = (size * self.intervals).nan_to_num(0).long().clamp_max(self.intervals - 1)
        slope, start = read_table(slopes, piece), read_table(starts, piece)
        return (slope * (size - piece / self.intervals) + start).clamp(0, 1)

    def _expanded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns `f^-1(k / s)`, `k = 0 .. s`, and the slope of `f` there (no gradient)."""
        slopes, starts = self._heights(dtype)
        places = torch.arange(self.steps + 1, dtype=dtype, device=slopes.device) / self.steps
        piece = (torch.bucketize(places, starts.detach(), right=True) - 1).clamp_min(0)
        sizes = (places - starts[piece]) / slopes[piece] + piece / self.intervals
        # The ends are 0 and 1 whatever theta is, and not only up to rounding.
        middle = torch.cat([places[:1], sizes[1:-1], places[-1:]])
        return middle, slopes[piece].detach()

    def position(self, x: Tensor) -> Tensor:
        """Returns `s f(x / clip)`, differentiable, from 0 to `num_levels - 1`; its rounding is the code."""
        x = x.to(compute_dtype(x.dtype))
        unit = (x / self.bounded("clip").to(x.dtype)).clamp(self.lowest, 1.0)
        place = unit.sign() * self._compress(unit.abs())
        return (place - self.lowest) * self.steps

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Returns the level index of every value, `0 .. num_levels - 1`, uint8."""
        x = x.to(compute_dtype(x.dtype))
        unit = (x / self.bounded("clip").to(x.dtype)).clamp(self.lowest, 1.0)
        index = torch.round(self._compress(unit.abs()) * self.steps)
        return (unit.sign() * index - self.lowest * self.steps).to(torch.uint8)

    @torch.no_grad()
    def levels(self) -> Tensor:
        """Returns the levels, increasing, in the parameters' dtype."""
        sizes = self._expanded(self.clip.dtype)[0] * self.bounded("clip")
        return sizes if self.lowest == 0 else torch.cat([-sizes.flip(0)[:-1], sizes])


class LCQWeight(LCQ):
    """LCQ for weights: symmetric around zero, on weights that are divided by their standard deviation.

    Levels are `-+ clip f^-1(k / s)`, `s = 2^(b-1) - 1`, so `2^b - 1` of them, times the deviation (the
    paper's limited weight normalization; no gradient flows through the deviation here, about which the paper
    does not say). A tensor whose weights are all equal is taken as it is, with a deviation of 1.

    Args:
        bits: The code width, 2 to 8.
        clip_init: The first value of the clip, in standard deviations, a positive number.
        intervals: The number of pieces of the companding function, 2 or more.
    """

    lowest = -1.0

    def __init__(self, bits: int = 2, clip_init: float = 3.0, intervals: int = 16) -> None:
        super().__init__(bits, clip_init, intervals)
        self.steps = 2 ** (bits - 1) - 1
        self.num_levels = 2 * self.steps + 1

    def forward(self, weight: Tensor) -> Tensor:
        """Quantizes `weight` (any shape, floating); same shape and dtype."""
        wide, deviation = _normalized(weight)
        return (self._quantize(wide) * deviation).to(weight.dtype)

    def codes(self, weight: Tensor) -> Tensor:
        """Returns the level index of every weight, uint8."""
        return super().codes(_normalized(weight)[0])

    def position(self, weight: Tensor) -> Tensor:
        """Returns the place among the codes, differentiable."""
        wide = weight.to(compute_dtype(weight.dtype))
        return super().position(wide / nonzero(wide.std(correction=0)))


def _normalized(weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = weight.to(compute_dtype(weight.dtype))
    deviation = nonzero(wide.detach().std(correction=0))
    return wide / deviation, deviation
