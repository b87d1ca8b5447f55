"""Weight levels with the least squared error on normally distributed weights, from their own statistics.

Max, "Quantizing for Minimum Distortion", IRE Transactions on Information Theory 6(1), 1960, table II: the
distance of evenly spaced levels with which a normal variable is quantized best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_n2uq.ops.ste import straight_through
from lightning_n2uq.quantizers.integer_levels import IntegerLevels, channel_mean, nonzero

DISTANCE = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
"""Distance of neighbouring levels in standard deviations, by bits."""


class LeastErrorWeight(IntegerLevels):
    """The odd multiples of `d/2` nearest to the weight, `-(2^b - 1) .. 2^b - 1`, `d = DISTANCE[b] * rms(W)`.

    The root of the mean square is that of an output channel. The levels are N2UQ's with another scale: where
    that one uses all levels equally often, which clips 13 % of normally distributed weights at 4 bits, this
    one has the least squared error. Nothing is learned.

    Gradient: that of the quantized weight, unchanged and not clipped; none flows through `d`.

    Args:
        bits: The code width, 2 to 8.
    """

    name = "least_error"

    def __init__(self, bits: int = 2) -> None:
        super().__init__(bits)

    def scale(self, weight: Tensor) -> Tensor:
        """Returns `d / 2` `[C, 1, ..]` of a weight `[C, ...]`, differentiable."""
        return channel_mean(weight.square()).sqrt() * (DISTANCE[self.bits] / 2)

    def place(self, weight: Tensor) -> Tensor:
        """Returns where weights lie between the levels, from 0 for the lowest, not rounded or clipped."""
        return (weight / nonzero(self.scale(weight)) + (self.num_levels - 1)) / 2

    def parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns odd integers and `d / 2`."""
        highest = self.num_levels - 1
        return 2 * torch.round(self.place(weight)).clamp(0, highest) - highest, self.scale(weight)

    def value(self, weight: Tensor) -> Tensor:
        """Returns the quantized weight; the gradient passes unchanged."""
        integers, scale = self.parts(weight.detach())
        return straight_through(weight, integers * scale)
