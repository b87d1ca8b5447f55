"""The weight quantizer without its entropy-preserving scale: the ablation that the scale is judged by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_n2uq.ops.tables import compute_dtype


def largest_weight(weight: Tensor) -> Tensor:
    """`max |W|` per output channel (dim 0), `[C, 1, ..]`, in the compute dtype; no gradient."""
    dims = tuple(range(1, weight.dim()))
    return weight.detach().to(compute_dtype(weight.dtype)).abs().amax(dim=dims, keepdim=True)


def plain_weight_codes(weight: Tensor, bits: int) -> Tensor:
    """Odd integers `-n, -n + 2, .., n` (compute dtype) nearest to `n W / max |W|`, halves to even."""
    n = 2**bits - 1
    scaled = weight.detach().to(compute_dtype(weight.dtype)) / _nonzero(largest_weight(weight))
    return torch.round((scaled.clamp(-1, 1) + 1) * (n / 2)) * 2 - n


def plain_quantize_weight(weight: Tensor, bits: int, straight_through: bool = False) -> Tensor:
    """Quantizes weights to odd multiples of `max |W| / n` per output channel: min-max scaling.

    The levels are those of `quantize_weight` with another scale: nothing is clipped, and most weights of a
    bell-shaped distribution fall on the two levels in the middle. Gradient as there: `1 / max |W|` times
    the upstream gradient, or the upstream gradient itself with `straight_through`.

    Args:
        weight: `[C, ...]`, at least 2-D, floating.
        bits: 1 to 8.
        straight_through: which gradient.

    Returns:
        Shape and dtype of `weight`; a channel of zeros gives zeros.
    """
    value: Tensor = _PlainQuantize.apply(weight, bits, straight_through)
    return value


class _PlainQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, straight_through: bool) -> Tensor:  # noqa: ANN401
        largest = largest_weight(weight)
        ctx.save_for_backward(largest)
        ctx.straight_through = straight_through
        return (plain_weight_codes(weight, bits) * (largest / (2**bits - 1))).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        if ctx.straight_through:
            return grad, None, None
        (largest,) = ctx.saved_tensors
        return (grad.to(largest.dtype) / _nonzero(largest)).to(grad.dtype), None, None


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)
