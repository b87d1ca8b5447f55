"""The weight quantizer without its entropy-preserving scale: the ablation that the scale is judged by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_n2uq.ops import reference
from lightning_n2uq.ops.tables import compute_dtype


def largest_weight(weight: Tensor) -> Tensor:
    """Returns `max |W|` per output channel (dim 0), `[C, 1, ..]`, in the compute dtype; no gradient."""
    dims = tuple(range(1, weight.dim()))
    return weight.detach().to(compute_dtype(weight.dtype)).abs().amax(dim=dims, keepdim=True)


def plain_weight_codes(weight: Tensor, bits: int) -> Tensor:
    """Returns odd integers `-n, -n + 2, .., n` nearest to `n W / max |W|`, in the compute dtype."""
    return reference.codes_of_scale(weight, largest_weight(weight), bits)


def plain_quantize_weight(weight: Tensor, bits: int, straight_through: bool = False) -> Tensor:
    """Quantizes weights to odd multiples of `max |W| / n` per output channel: min-max scaling.

    The levels are those of `quantize_weight` with another scale: nothing is clipped, and most weights of a
    bell-shaped distribution fall on the two levels in the middle. Gradient as there: `1 / max |W|` times
    the upstream gradient, or the upstream gradient itself with `straight_through`.

    Args:
        weight: The weight `[C, ...]`, at least 2-D, floating.
        bits: The code width, 1 to 8.
        straight_through: Whether the upstream gradient is handed on as it is.

    Returns:
        The quantized weight in shape and dtype of `weight`; a channel of zeros gives zeros.
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
