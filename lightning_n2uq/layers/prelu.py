"""The activation in front of every quantizer of the paper's networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BiasedPReLU(nn.Module):
    """Per-channel bias, PReLU, per-channel bias (N2UQ, CVPR 2022, figure 2).

    Args:
        channels: Number of channels of the input.

    Attributes:
        bias_in: `[C]`, starts at 0.
        slope: `[C]`, the slope of PReLU below zero, starts at 0.25.
        bias_out: `[C]`, starts at 0.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias_in = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))
        self.bias_out = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, C, H, W]` to the same shape."""
        x = F.prelu(x + self.bias_in.view(-1, 1, 1), self.slope)
        return x + self.bias_out.view(-1, 1, 1)

    def extra_repr(self) -> str:
        """Shows the channels in `print(model)`."""
        return str(self.slope.numel())
