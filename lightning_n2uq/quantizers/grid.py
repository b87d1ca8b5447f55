"""A signed or unsigned grid with a learned range: 8-bit maps, weights and images of integer-only networks.

Step by gradient: Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153, Eq. 1-3. Its
logarithm is what learns: Jain et al., "Trained Quantization Thresholds", MLSys 2020, arXiv 1903.08066. One
step for both summands of an addition, and weights without the lowest level: Jacob et al., "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018, arXiv 1712.05877.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_n2uq.ops.ste import round_ste, scale_gradient
from lightning_n2uq.quantizers.base import DataInitializedQuantizer
from lightning_n2uq.quantizers.looks import looking


class UniformGrid(DataInitializedQuantizer):
    """`step * round(clamp(x / step, low, high))`, `step = 2^log2_range / high`, the range learned.

    Signed levels are `-high .. high`, `high = 2^(bits - 1) - 1`, so that every level has its negative;
    unsigned ones `0 .. 2^bits - 1`. Zero is a level, which pads images exactly.

    Gradient: of `x`, 1 inside the clipping range and 0 outside; of `step`, `round(x / step) - x / step`
    inside and `low` or `high` outside, times `1 / sqrt(numel * high)` (LSQ, Eq. 3 and section 2.2); of
    `log2_range`, that times `step * ln 2` (TQT, section 3): an optimizer's step changes the range by a
    factor, whatever its size, and the range stays positive.

    Args:
        bits: The code width, 2 to 8.
        signed: Whether there are negative levels.

    Attributes:
        log2_range: The binary logarithm `[1]` of the largest level; its first value is that of the largest
            magnitude in the first batch.
    """

    name = "grid"

    def __init__(self, bits: int = 8, signed: bool = True) -> None:
        super().__init__(bits)
        self.signed = signed
        self.high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        self.low = -self.high if signed else 0
        self.num_levels = self.high - self.low + 1
        self.log2_range = nn.Parameter(torch.zeros(1))

    def first_values(self, x: Tensor) -> dict[str, Tensor]:
        """Returns the logarithm of the largest magnitude."""
        largest = x.float().abs().amax() if x.numel() else torch.ones((), device=x.device)
        return {"log2_range": largest.clamp_min(1e-8).log2().reshape(1)}

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes `x` (any shape, floating) in float32, or float64 if it has it; same shape and dtype."""
        step = self._learned(x)
        return (self._integers(x, step) * step).to(x.dtype)

    def add(self, left: Tensor, right: Tensor) -> Tensor:
        """Returns the sum of two maps, each on the grid, and clipped to it; shape and dtype of `left`.

        The first range is that of the largest magnitude among both and their sum. Gradient: that of `forward`
        for both maps and for the sum, which is rounded by nothing.
        """
        largest = (left.detach().abs() + right.detach().abs()) if not self.fitted else left
        step = self._learned(left, largest)
        total = self._integers(left, step) + self._integers(right, step)
        return (total.clamp(self.low, self.high) * step).to(left.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """Returns the index of every value's level, uint8; plus `low`, it is the level over the step."""
        with looking():
            step = self.current_step(x).detach()
        return (self._integers(x.detach(), step) - self.low).to(torch.uint8)

    def step(self, x: Tensor | None = None) -> Tensor:
        """Returns the distance of two levels, a float64 scalar without gradient.

        Args:
            x: What the grid is asked for, which decides where it has not seen any data in training.
        """
        range_ = self.log2_range if x is None else self.asked(x, "log2_range")[0]
        return torch.exp2(range_.detach().double()).reshape(()) / self.high

    def current_step(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        """Returns the distance of two levels `[1]`, differentiable, in float32 or in the wider dtype of `x`.

        Args:
            x: What is quantized.
            first: What the first range comes from, if not from `x`.
        """
        (range_,) = self.current(x if first is None else first, "log2_range")
        return torch.exp2(range_.to(torch.promote_types(range_.dtype, x.dtype))) / self.high

    def _learned(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        step = self.current_step(x, first)
        if torch.compiler.is_exporting():  # no gradient is wanted, and a batch of any size has no number
            return step
        return scale_gradient(step, 1.0 / math.sqrt(max(x.numel(), 1) * self.high))

    def _integers(self, x: Tensor, step: Tensor) -> Tensor:
        return round_ste((x.to(step.dtype) / step).clamp(self.low, self.high))
