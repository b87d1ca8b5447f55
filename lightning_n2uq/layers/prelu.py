"""The activation in front of every quantizer of the paper's networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_n2uq.ops.ste import straight_through


class BiasedPReLU(nn.Module):
    """Per-channel bias, PReLU, per-channel bias (N2UQ, CVPR 2022, figure 2).

    Args:
        channels: Number of channels of the input.
        monotone: Whether a negative slope counts as zero, so that thresholds behind the activation can be
            moved in front of it. The gradient of such a slope is that of a zero slope (straight-through).

    Attributes:
        bias_in: `[C]`, starts at 0.
        slope: `[C]`, the slope of PReLU below zero, starts at 0.25.
        bias_out: `[C]`, starts at 0.
    """

    def __init__(self, channels: int, monotone: bool = False) -> None:
        super().__init__()
        self.monotone = monotone
        self.bias_in = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))
        self.bias_out = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, C, H, W]` to the same shape."""
        x = F.prelu(x + self.bias_in.view(-1, 1, 1), self.slopes().to(x.dtype))
        return x + self.bias_out.view(-1, 1, 1)

    def slopes(self) -> Tensor:
        """Returns the slopes below zero that count, `[C]`."""
        return straight_through(self.slope, self.slope.detach().clamp_min(0)) if self.monotone else self.slope

    def extra_repr(self) -> str:
        """Shows the channels in `print(model)`."""
        return str(self.slope.numel())
