"""Straight-through building blocks of the baseline quantizers (Bengio et al. 2013, arXiv 1308.3432)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:  # noqa: ANN401
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return grad, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:  # noqa: ANN401
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return grad * ctx.factor, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Returns `value`, which has no gradient of its own; the gradient passes to `x` unchanged."""
    y: Tensor = _StraightThrough.apply(x, value)
    return y


def round_ste(x: Tensor) -> Tensor:
    """Rounds half to even; the gradient passes unchanged. Shape and dtype of `x`."""
    return straight_through(x, torch.round(x.detach()))


def floor_ste(x: Tensor, floor: float) -> Tensor:
    """Returns the larger of `x` and `floor`; NaN stays NaN. The gradient passes unchanged: `x` can rise."""
    return straight_through(x, x.detach().clamp_min(floor))


def next_above(x: Tensor) -> Tensor:
    """Returns the dtype's next larger number, so that `next_above(x) > t` is `x >= t`; a gradient passes."""
    return straight_through(x, torch.nextafter(x.detach(), x.new_tensor(float("inf"))))


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Returns `x`; its gradient is multiplied by `factor` (LSQ, section 2.2)."""
    y: Tensor = _ScaleGradient.apply(x, factor)
    return y


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """Returns the index (int64) of the nearest of increasing `levels` `[L]`; a tie goes to the lower."""
    return torch.bucketize(x.detach().contiguous(), (levels[1:] + levels[:-1]) / 2)


def project_ste(x: Tensor, levels: Tensor) -> Tensor:
    """Returns the nearest of the increasing `levels` `[L]`; the gradient passes unchanged. NaN stays NaN."""
    projected = levels[nearest_level(x, levels)]
    return straight_through(x, torch.where(x.isnan(), x, projected).detach())
