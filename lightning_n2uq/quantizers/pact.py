"""PACT: activations clipped at a learned value.

Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", 2018, arXiv 1805.06085.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_n2uq.ops.ste import round_ste
from lightning_n2uq.ops.uniform import UniformParameters
from lightning_n2uq.quantizers.base import STEP_FLOOR, Quantizer
from lightning_n2uq.utils.validation import check, check_choice

GRADIENTS = ("paper", "published")


class PACT(Quantizer):
    """`clip / n * round(clamp(x, 0, clip) * n / clip)`, `n = 2^b - 1`, the clip learned (PACT, Eq. 1-3).

    Gradient: of `x`, 1 for `0 <= x < clip`, else 0; of `clip`, 1 for `x >= clip`, else 0. The published N2UQ
    code lets `clip` learn from its scale as well: `round(x n / clip) / n` below the clip, 2 above it; that is
    the gradient `published`, kept to reproduce its training. A clip below `STEP_FLOOR` counts as
    `STEP_FLOOR`, with the same gradient.

    Args:
        bits: The code width, 2 to 8.
        clip_init: The first value of the clip, a positive number. The paper starts near 10 and pulls it down
            by weight decay; here the inputs are batch-normalised and the clip is not decayed, hence 2.
        gradient: Which gradient the clip gets, `paper` or `published`.
    """

    name = "pact"
    positive = ("clip",)

    def __init__(self, bits: int = 2, clip_init: float = 2.0, gradient: str = "paper") -> None:
        super().__init__(bits)
        check(clip_init > 0, "clip_init", clip_init, "is a positive number")
        self.gradient = check_choice("gradient", gradient, GRADIENTS)
        self.clip = nn.Parameter(torch.tensor([float(clip_init)]))

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes `x` (any shape, floating) in float32; same shape and dtype."""
        clip = self.bounded("clip")
        clipped = torch.where(x >= clip, clip, x.to(clip.dtype).clamp_min(0))
        step = clip.detach() / (self.num_levels - 1)
        y = round_ste(clipped / step) * step
        if self.gradient == "published":
            share = (y / clip).detach()  # round(x n / clip) / n
            y = y + share * (clip - clip.detach())
        return y.to(x.dtype)

    def grid(self, x: Tensor) -> UniformParameters | None:
        """Returns the clip, None at the floor."""
        if not STEP_FLOOR < float(self.clip.detach()) < math.inf:
            return None
        method = "pact" if self.gradient == "paper" else "pact_published"
        return UniformParameters(method, self.bits, self.clip)

    def codes(self, x: Tensor) -> Tensor:
        """Returns the level index of every value, `0 .. 2^b - 1`, uint8."""
        clip = self.bounded("clip").detach()
        clipped = torch.minimum(x.detach().to(clip.dtype).clamp_min(0), clip)
        return torch.round(clipped / (clip / (self.num_levels - 1))).to(torch.uint8)
