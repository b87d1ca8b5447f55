"""Weights of one bit: their sign, times the mean magnitude of their output channel.

Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks", ECCV 2016,
arXiv 1603.05279, section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_n2uq.ops.ste import straight_through
from lightning_n2uq.quantizers.integer_levels import IntegerLevels, channel_mean


class BinaryWeight(IntegerLevels):
    """`mean|W| * sign(W)` with the mean per output channel (XNOR-Net, section 3.1); the sign of 0 is 1.

    Gradient: that of the quantized weight where `|W| <= 1`, else 0; none flows through the mean. XNOR-Net
    lets some flow; without it is what later binary networks train with (ReActNet, arXiv 2003.03488).

    Args:
        bits: The code width, 1.
    """

    name = "binary"
    widths_allowed = (1, 1)

    def __init__(self, bits: int = 1) -> None:
        super().__init__(bits)

    def parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns -1 and 1, and the mean magnitude."""
        signs = torch.where(weight < 0, -1.0, 1.0).to(weight.dtype)
        return torch.where(weight.isnan(), weight, signs), channel_mean(weight.abs())

    def value(self, weight: Tensor) -> Tensor:
        """Returns the quantized weight; the gradient passes where the weight is within -1 and 1."""
        integers, scale = self.parts(weight.detach())
        return straight_through(weight.clamp(-1, 1), integers * scale)
