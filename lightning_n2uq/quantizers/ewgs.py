"""EWGS: a uniform quantizer on a learned interval, whose gradient is scaled element by element.

Lee, Kim, Ham, "Network Quantization with Element-wise Gradient Scaling", CVPR 2021, arXiv 2104.00903.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_n2uq.ops.ste import floor_ste
from lightning_n2uq.quantizers.base import STEP_FLOOR, DataInitializedQuantizer
from lightning_n2uq.quantizers.integer_levels import IntegerLevels
from lightning_n2uq.utils.validation import check_number

DELTA = 1e-3


class _ScaledRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unit: Tensor, steps: int, delta: float) -> Tensor:  # noqa: ANN401
        value = torch.round(unit * steps) / steps
        ctx.save_for_backward(unit)
        ctx.steps, ctx.delta = steps, delta
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (unit,) = ctx.saved_tensors
        error = unit - torch.round(unit * ctx.steps) / ctx.steps
        return grad * (1 + ctx.delta * grad.sign() * error), None, None


def scaled_round(unit: Tensor, steps: int, delta: float) -> Tensor:
    """Returns `round(unit * steps) / steps`, with the gradient `g (1 + delta sign(g) (unit - value))`.

    That is the paper's element-wise scaling of the upstream gradient `g`; `delta` 0 is straight-through.
    """
    y: Tensor = _ScaledRound.apply(unit, steps, delta)
    return y


class EWGS(DataInitializedQuantizer):
    """`round(n v) / n`, `v = clamp((x - lower) / (upper - lower), 0, 1)`, `n = 2^b - 1`, both ends learned.

    The value is in `[0, 1]` whatever the interval is; the weight's learned scale, or a following
    normalization, gives it its size.

    Gradient: of `v`, `g (1 + delta sign(g) (v - value))`; of `x` and both ends, that through `v`. A width
    `upper - lower` below `STEP_FLOOR` counts as `STEP_FLOOR`, with the same gradient.

    Args:
        bits: The code width, 2 to 8.
        delta: The strength of the scaling, 0 or more. The paper adapts it to the Hessian's trace during
            training; here it stays as it is.

    Attributes:
        lower: The lower end `[1]`; it starts at the smallest value.
        upper: The upper end `[1]`; it starts three deviations above, with the deviation of the half normal
            distribution taken for a ReLU's output.
    """

    name = "ewgs"

    def __init__(self, bits: int = 2, delta: float = DELTA) -> None:
        super().__init__(bits)
        self.delta = check_number("delta", delta, 0, math.inf)
        self.lower = nn.Parameter(torch.zeros(1))
        self.upper = nn.Parameter(torch.ones(1))

    def first_values(self, x: Tensor) -> dict[str, Tensor]:
        """Returns the first ends of the interval."""
        x = x.float()
        lower = x.min()
        width = 3 * x.std(correction=0) / math.sqrt(1 - 2 / math.pi)
        return {"lower": lower, "upper": lower + width.clamp_min(STEP_FLOOR)}

    def place(self, x: Tensor, ends: tuple[Tensor, ...] | None = None) -> Tensor:
        """Returns `v`, differentiable, in the dtype of both ends.

        Args:
            x: The values, of any shape.
            ends: Both ends, if they are known already.
        """
        lower, upper = (self.current(x, "lower", "upper") if ends is None else ends)[:2]
        width = floor_ste(upper - lower, STEP_FLOOR)
        return ((x.to(lower.dtype) - lower) / width).clamp(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes `x` (any shape, floating) in float32; same shape and dtype."""
        return scaled_round(self.place(x), self.num_levels - 1, self.delta).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """Returns the level index of every value, `0 .. 2^b - 1`, uint8."""
        ends = tuple(end.detach() for end in self.asked(x, "lower", "upper"))
        return torch.round(self.place(x.detach(), ends) * (self.num_levels - 1)).to(torch.uint8)


class EWGSWeight(IntegerLevels, EWGS):
    """`scale * (2 round(n v) / n - 1)`: odd multiples of `scale / n`, the interval and the scale learned.

    The interval starts at minus and plus three deviations. The scale is the paper's factor on the layer's
    output; it starts where the mean magnitude of the quantized weights is that of the weights. Gradients are
    those of `EWGS`, and of the scale the level over it. A scale below `STEP_FLOOR` counts as `STEP_FLOOR`,
    with the same gradient.

    Args:
        bits: The code width, 2 to 8.
        delta: The strength of the scaling, 0 or more.
    """

    positive = ("scale",)

    def __init__(self, bits: int = 2, delta: float = DELTA) -> None:
        super().__init__(bits, delta)
        self.scale = nn.Parameter(torch.ones(1))

    def first_values(self, x: Tensor) -> dict[str, Tensor]:
        """Returns the first interval and the first scale."""
        x = x.float()
        end = (3 * x.std(correction=0)).clamp_min(STEP_FLOOR)
        n = self.num_levels - 1
        levels = 2 * torch.round(((x + end) / (2 * end)).clamp(0, 1) * n) / n - 1
        scale = x.abs().mean() / levels.abs().mean().clamp_min(STEP_FLOOR)
        return {"lower": -end, "upper": end, "scale": scale.clamp_min(STEP_FLOOR)}

    def forward(self, weight: Tensor) -> Tensor:
        """Quantizes `weight` (any shape, floating); same shape and dtype."""
        return IntegerLevels.forward(self, weight)

    def weight_grid(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns odd integers and `scale / n`; None at 8 bits, whose integers need 9."""
        return super().weight_grid(weight)

    def codes(self, x: Tensor) -> Tensor:
        """Returns the level index of every weight, `0 .. 2^b - 1`, uint8."""
        return IntegerLevels.codes(self, x)

    def parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns odd integers and `scale / n`."""
        ends = tuple(value.detach() for value in self.current(weight, "lower", "upper", "scale"))
        n = self.num_levels - 1
        return 2 * torch.round(self.place(weight, ends) * n) - n, ends[2].to(weight.dtype) / n

    def value(self, weight: Tensor) -> Tensor:
        """Returns the quantized weight, with the gradients of the class."""
        values = self.current(weight, "lower", "upper", "scale")
        unit = scaled_round(self.place(weight, values), self.num_levels - 1, self.delta)
        return (2 * unit - 1) * values[2]
