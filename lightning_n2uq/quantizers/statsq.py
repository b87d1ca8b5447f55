"""StatsQ: weight levels from the weights' own statistics, so that no learned scale makes them oscillate.

Liu et al., "Oscillation-free Quantization for Low-bit Vision Transformers" (OFQ), ICML 2023, arXiv
2302.02210, section 4 (statistical weight quantization; cited without equation numbers).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_n2uq.ops.ste import straight_through
from lightning_n2uq.quantizers.integer_levels import IntegerLevels, channel_mean, nonzero


class StatsQ(IntegerLevels):
    """`s * (round(n clamp(W / s, -1, 1) - 1/2) + 1/2) / n`, `n = 2^(b-1)`, `s = 2 mean|W|` per channel.

    Levels are odd multiples of `s / (2 n)`, `2^b` of them, without zero. Nothing is learned.

    Gradient: that of the quantized weight, unchanged and not clipped; none flows through `s`.

    Args:
        bits: The code width, 2 to 8.
    """

    name = "statsq"

    def __init__(self, bits: int = 2) -> None:
        super().__init__(bits)

    def parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns odd integers and `s / (2 n)`."""
        half = self.num_levels // 2
        scale = 2 * channel_mean(weight.abs())
        place = weight / nonzero(scale) * half - 0.5
        return 2 * torch.round(place).clamp(-half, half - 1) + 1, scale / self.num_levels

    def value(self, weight: Tensor) -> Tensor:
        """Returns the quantized weight; the gradient passes unchanged."""
        integers, scale = self.parts(weight.detach())
        return straight_through(weight, integers * scale)
