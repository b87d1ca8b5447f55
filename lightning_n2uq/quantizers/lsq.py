"""LSQ and LSQ+: uniform quantizers with a learned step.

Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153.
Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better
initialization", CVPR workshops 2020, arXiv 2004.09576.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_n2uq.ops.ste import round_ste, scale_gradient
from lightning_n2uq.ops.uniform import UniformParameters
from lightning_n2uq.quantizers.base import STEP_FLOOR, DataInitializedQuantizer
from lightning_n2uq.quantizers.ranges import fitted_range, sample_values


class LSQ(DataInitializedQuantizer):
    """`step * round(clamp(x / step, low, high))`, the step learned (LSQ, Eq. 1-3).

    Gradient: of `x`, 1 inside the clipping range and 0 outside; of `step`, `round(x / step) - x / step`
    inside and `low` or `high` outside, times `1 / sqrt(numel * high)` (LSQ, section 2.2). A step below
    `STEP_FLOOR` counts as `STEP_FLOOR`, with the same gradient.

    Args:
        bits: The code width, 2 to 8.
        signed: Whether the levels are `-2^(b-1) .. 2^(b-1) - 1` (weights) and not `0 .. 2^b - 1`
            (activations).
    """

    name = "lsq"
    positive = ("step",)

    def __init__(self, bits: int = 2, signed: bool = False) -> None:
        super().__init__(bits)
        self.signed = signed
        self.low = -(2 ** (bits - 1)) if signed else 0
        self.high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        self.step = nn.Parameter(torch.ones(1))

    def first_values(self, x: Tensor) -> dict[str, Tensor]:
        """Returns the step `2 mean|x| / sqrt(high)` (LSQ, section 2.1)."""
        return {"step": (2 * x.float().abs().mean() / math.sqrt(self.high)).clamp_min(STEP_FLOOR)}

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes `x` (any shape, floating) in float32; same shape and dtype."""
        (step,) = self.current(x, "step")
        step = self._learned(step, x)
        return (self._integers(x, step) * step).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """Returns the level index of every value, `0 .. 2^b - 1`, uint8."""
        (step,) = self.asked(x, "step")
        return (self._integers(x.detach(), step.detach()) - self.low).to(torch.uint8)

    def grid(self, x: Tensor) -> UniformParameters | None:
        """Returns step (and offset), None before they have their first value and at the floor."""
        if self.signed or not self.fitted or not STEP_FLOOR < float(self.step.detach()) < math.inf:
            return None
        return UniformParameters(self.name, self.bits, self._learned(self.step, x))

    @property
    def largest_level(self) -> int:
        """`2^(b-1)` of weights; activations have none."""
        return -self.low

    def weight_grid(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns the integers `-2^(b-1) .. 2^(b-1) - 1` and the step, one for all channels."""
        if not self.signed or not self.fitted:
            return None
        step = self.bounded("step").detach()
        return self._integers(weight.detach(), step).to(torch.int8), step.expand(len(weight))

    def _learned(self, parameter: Tensor, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():  # no gradient is wanted, and a batch of any size has no number
            return parameter
        return scale_gradient(parameter, 1.0 / math.sqrt(max(x.numel(), 1) * self.high))

    def _integers(self, x: Tensor, step: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        return round_ste(((x.to(step.dtype) - offset) / step).clamp(self.low, self.high))


class SignedLSQ(LSQ):
    """LSQ with levels `-2^(b-1) .. 2^(b-1) - 1` for activations that have no ReLU in front."""

    name = "lsq_signed"

    def __init__(self, bits: int = 2) -> None:
        super().__init__(bits, signed=True)


class LSQPlus(LSQ):
    """LSQ with a learned offset for activations, and other first values (LSQ+, Eq. 3-5).

    `step * round(clamp((x - offset) / step, low, high)) + offset`. Gradient of `offset`: 0 inside the
    clipping range, 1 outside, scaled like the step's. Weights (`signed`) have no offset, as in the paper.

    Activations begin with step and offset of the least squared error on the first data, as the paper has
    it; found by a search over the ends of the range, not by descent. From the smallest to the largest value,
    the few levels of 2 bits would be spent on outliers.
    """

    name = "lsq_plus"

    def __init__(self, bits: int = 2, signed: bool = False) -> None:
        super().__init__(bits, signed)
        self.offset = None if signed else nn.Parameter(torch.zeros(1))

    def first_values(self, x: Tensor) -> dict[str, Tensor]:
        """Returns step and offset of least squared error; of weights the step `max|mean -+ 3 std| / 2^(b-1)`.

        The error is that of 16,384 values evenly spread over `x`. Zero lies in the range.
        """
        x = x.float()
        if self.signed:
            std, mean = torch.std_mean(x, correction=0)
            bound = torch.maximum((mean - 3 * std).abs(), (mean + 3 * std).abs())
            return {"step": (bound / 2 ** (self.bits - 1)).clamp_min(STEP_FLOOR)}
        exporting = torch.compiler.is_exporting()  # a batch of any size has no number to sample by
        low, high = fitted_range(x.flatten() if exporting else sample_values(x), self.num_levels)
        return {"step": ((high - low) / (self.high - self.low)).clamp_min(STEP_FLOOR), "offset": low}

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes `x` (any shape, floating) in float32; same shape and dtype."""
        if self.signed:
            return super().forward(x)
        step, offset = (self._learned(p, x) for p in self.current(x, "step", "offset"))
        return (self._integers(x, step, offset) * step + offset).to(x.dtype)

    def grid(self, x: Tensor) -> UniformParameters | None:
        """Returns step and offset, None before they have their first value."""
        found = super().grid(x)
        if found is None or self.offset is None:
            return None
        return found._replace(offset=self._learned(self.offset, x))

    def weight_grid(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns the integers and the step, as LSQ does."""
        return super().weight_grid(weight)

    def codes(self, x: Tensor) -> Tensor:
        """Returns the level index of every value, `0 .. 2^b - 1`, uint8."""
        if self.signed:
            return super().codes(x)
        step, offset = (p.detach() for p in self.asked(x, "step", "offset"))
        return (self._integers(x.detach(), step, offset) - self.low).to(torch.uint8)
