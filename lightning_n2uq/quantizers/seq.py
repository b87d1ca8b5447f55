"""SEQ, the stretched elastic quantizer: learned scale, levels that are balanced around zero at few bits.

Liu et al., "ParetoQ: Scaling Laws in Extremely Low-bit LLM Quantization", 2025, arXiv 2502.02631: the
quantizer for 1.58 and 2 bits, and its gradients. Equation numbers are left out: the numbering differs between
versions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_n2uq.ops.ste import scale_gradient, straight_through
from lightning_n2uq.quantizers.base import STEP_FLOOR, DataInitializedQuantizer
from lightning_n2uq.quantizers.integer_levels import IntegerLevels

CLIP = 1 - 1e-2
"""Where the published code clips `W / alpha`, so that rounding never reaches a level beyond the last."""


class SEQ(IntegerLevels, DataInitializedQuantizer):
    """`alpha * (round(n clamp(W / alpha, -c, c) - 1/2) + 1/2) / n`, `n = 2^(b-1)`, `c = 0.99`.

    Levels are odd multiples of `alpha / (2 n)`; the paper uses them at 2 bits, where they are
    `+-alpha / 4, +-3 alpha / 4`. `alpha` is learned, one per output channel once `set_channels` is called
    (layers do), else one for all. It starts at the largest magnitude of its weights.

    Gradient: of `W`, 1 where `|W / alpha| <= c`, else 0; of `alpha`, level minus `W / alpha` inside and
    the outermost level `+-(n - 1/2) / n` outside, times `1 / sqrt(numel * max(1, 2^(b-1) - 1))`. An `alpha`
    below `STEP_FLOOR` counts as `STEP_FLOOR`, with the same gradient.

    Args:
        bits: The code width, 2 to 8.
    """

    name = "seq"
    positive = ("alpha",)
    level_offset = 0.5

    def __init__(self, bits: int = 2) -> None:
        super().__init__(bits)
        self.span = 2 ** (bits - 1) * 1.0
        self.alpha = nn.Parameter(torch.ones(1))

    def set_channels(self, channels: int) -> None:
        """Gives every output channel an `alpha` of its own."""
        self.alpha = nn.Parameter(self.alpha.detach()[:1].repeat(channels))

    def first_values(self, x: Tensor) -> dict[str, Tensor]:
        """Returns the largest magnitude, of each channel where there is an `alpha` for each."""
        sizes = x.float().abs()
        sizes = sizes.flatten(1).amax(1) if self.alpha.numel() > 1 else sizes.amax()
        return {"alpha": sizes.clamp_min(STEP_FLOOR)}

    def scale(self, weight: Tensor) -> Tensor:
        """Returns `alpha`, bounded below and differentiable: `[1]` or `[C, 1, ..]`, dtype of `weight`."""
        (alpha,) = self.current(weight, "alpha")
        alpha = alpha.to(weight.dtype)
        return alpha if alpha.numel() == 1 else alpha.reshape(-1, *(1,) * (weight.dim() - 1))

    def parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns integers, and the number that they are multiplied by."""
        alpha = self.scale(weight).detach()
        numbers = self._numbers(weight / alpha)
        return (2 * numbers + 1, alpha / (2 * self.span)) if self.odd else (numbers, alpha / self.span)

    def value(self, weight: Tensor) -> Tensor:
        """Returns the quantized weight, with the gradients of the class."""
        alpha = scale_gradient(self.scale(weight), self._gradient_scale(weight))
        unit = (weight / alpha).clamp(-CLIP, CLIP)
        return straight_through(unit, (self._numbers(unit.detach()) + self.level_offset) / self.span) * alpha

    def place(self, weight: Tensor) -> Tensor:
        """Returns the number whose rounding is the level's index, not clipped; differentiable."""
        return weight / self.scale(weight) * self.span + (self.num_levels - 1) / 2

    def _numbers(self, unit: Tensor) -> Tensor:
        return torch.round(unit.clamp(-CLIP, CLIP) * self.span - self.level_offset)

    def _gradient_scale(self, weight: Tensor) -> float:
        if torch.compiler.is_exporting():
            return 1.0
        return 1.0 / math.sqrt(max(weight.numel(), 1) * max(1, 2 ** (self.bits - 1) - 1))


class SEQTernary(SEQ):
    """SEQ at 1.58 bits: `alpha * round(3/2 clamp(W / alpha, -c, c)) / (3/2)`: `-2/3 alpha, 0, 2/3 alpha`.

    Gradients are those of `SEQ`. Three levels, in codes of 2 bits.

    Args:
        bits: The code width, 2.
    """

    name = "seq_ternary"
    widths_allowed = (2, 2)
    odd = False
    level_offset = 0.0

    def __init__(self, bits: int = 2) -> None:
        super().__init__(bits)
        self.num_levels = 3
        self.span = 1.5
