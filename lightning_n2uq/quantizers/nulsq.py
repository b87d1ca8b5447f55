"""nuLSQ: LSQ with a step of its own between every two neighbouring levels.

Gongyo et al., "Learning Non-Uniform Step Sizes for Neural Network Quantization", ACCV 2024 (pages 4385-4402).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_n2uq.ops.level_table import level_place, nearest_of_learned
from lightning_n2uq.ops.ste import scale_gradient
from lightning_n2uq.quantizers.base import STEP_FLOOR, DataInitializedQuantizer


class NuLSQ(DataInitializedQuantizer):
    """The nearest of the levels `0, s_1, s_1 + s_2, ..`, all steps `s_k` learned; a tie goes to the lower.

    Weights (`signed`) have `2^(b-1)` steps below zero and `2^(b-1) - 1` above, as LSQ has levels. The levels
    are not evenly spaced: there is no integer arithmetic and no integer export.

    Gradient: of `x`, 1 from the lowest to the highest level and 0 outside; of the step around `x`, the
    rounded minus the exact place of `x` in it (from zero outwards); of every step on one side of zero, the
    sign of that side for values beyond its last level, times `1 / sqrt(numel * high)` as LSQ has it. A step
    below `STEP_FLOOR` counts as `STEP_FLOOR`, with the same gradient.

    Args:
        bits: The code width, 2 to 8.
        signed: Whether there are levels below zero (weights).

    Attributes:
        steps: The steps `[2^b - 1]`: those below zero from zero outwards, then those above. All start at
            LSQ's `2 mean|x| / sqrt(high)`.
    """

    name = "nulsq"
    positive = ("steps",)

    def __init__(self, bits: int = 2, signed: bool = False) -> None:
        super().__init__(bits)
        self.signed = signed
        self.below = 2 ** (bits - 1) if signed else 0
        self.high = 2**bits - 1 - self.below
        self.steps = nn.Parameter(torch.ones(2**bits - 1))

    def first_values(self, x: Tensor) -> dict[str, Tensor]:
        """Returns LSQ's first step, for every step."""
        step = (2 * x.float().abs().mean() / math.sqrt(self.high)).clamp_min(STEP_FLOOR)
        return {"steps": step.expand(self.steps.numel())}

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes `x` (any shape, floating) in the dtype of the steps; same shape and dtype."""
        (steps,) = self.current(x, "steps")
        if not torch.compiler.is_exporting():  # no gradient is wanted, and a batch of any size has no number
            steps = scale_gradient(steps, 1.0 / math.sqrt(max(x.numel(), 1) * self.high))
        return nearest_of_learned(x.to(steps.dtype), self._sums(steps)).to(x.dtype)

    def levels(self, x: Tensor | None = None) -> Tensor:
        """Returns the levels `[2^b]`, increasing.

        Args:
            x: What the quantizer is asked for, which decides where it has not seen any data in training.
        """
        steps = self.bounded("steps") if x is None else self.asked(x, "steps")[0]
        return self._sums(steps)

    def codes(self, x: Tensor) -> Tensor:
        """Returns the level index of every value, `0 .. 2^b - 1`, uint8."""
        levels = self.levels(x).detach()
        lower, share = level_place(x.detach().to(levels.dtype), levels)
        return (lower + (share > 0.5)).to(torch.uint8)

    def _sums(self, steps: Tensor) -> Tensor:
        below = -steps[: self.below].cumsum(0).flip(0)
        return torch.cat([below, steps.new_zeros(1), steps[self.below :].cumsum(0)])
