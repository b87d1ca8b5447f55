"""DoReFa-Net: fixed-range quantizers, weights squashed by tanh.

Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth
Gradients", 2016, arXiv 1606.06160.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_n2uq.ops.ste import round_ste
from lightning_n2uq.ops.uniform import UniformParameters
from lightning_n2uq.quantizers.base import Quantizer


class DoReFa(Quantizer):
    """`round(n clamp(x, 0, 1)) / n`, `n = 2^b - 1` (DoReFa, Eq. 11). Nothing is learned.

    Gradient of `x`: 1 inside `[0, 1]`, 0 outside.
    """

    name = "dorefa"

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes `x` (any shape, floating) in float32; same shape and dtype."""
        n = self.num_levels - 1
        return (round_ste(_wide(x).clamp(0, 1) * n) / n).to(x.dtype)

    def grid(self, x: Tensor) -> UniformParameters:
        """Returns the bits: the range is fixed."""
        return UniformParameters(self.name, self.bits)

    def codes(self, x: Tensor) -> Tensor:
        """Returns the level index of every value, `0 .. 2^b - 1`, uint8."""
        return torch.round(_wide(x.detach()).clamp(0, 1) * (self.num_levels - 1)).to(torch.uint8)


class DoReFaWeight(Quantizer):
    """`2 round(n u) / n - 1` with `u = tanh(W) / (2 max|tanh W|) + 1/2`, `n = 2^b - 1` (DoReFa, Eq. 9).

    Gradient: through the tanh and the maximum, straight through the rounding. Levels are odd multiples of
    `1 / n`; a tensor of zeros stays zero.
    """

    name = "dorefa"

    def forward(self, weight: Tensor) -> Tensor:
        """Quantizes `weight` (any shape, floating) in float32; same shape and dtype."""
        n = self.num_levels - 1
        unit, largest = self._unit(weight)
        quantized = round_ste(unit * n) * (2 / n) - 1
        return torch.where(largest == 0, torch.zeros_like(quantized), quantized).to(weight.dtype)

    @property
    def largest_level(self) -> int:
        """`2^b - 1`; 0 at 8 bits, whose integers need 9."""
        return self.num_levels - 1 if self.bits <= 7 else 0

    def weight_grid(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns odd integers `-n .. n` (0 for a tensor of zeros) and `1 / n`; None at 8 bits."""
        if self.bits > 7:
            return None
        n = self.num_levels - 1
        unit, largest = self._unit(weight.detach())
        levels = torch.where(largest == 0, 0.0, 2 * torch.round(unit * n) - n)
        return levels.to(torch.int8), torch.full((len(weight),), 1 / n)

    def codes(self, weight: Tensor) -> Tensor:
        """Returns the level index of every value, `0 .. 2^b - 1`, uint8."""
        return torch.round(self._unit(weight.detach())[0] * (self.num_levels - 1)).to(torch.uint8)

    def _unit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        squashed = torch.tanh(_wide(weight))
        largest = squashed.abs().amax()
        return squashed / (2 * torch.where(largest == 0, torch.ones_like(largest), largest)) + 0.5, largest


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
