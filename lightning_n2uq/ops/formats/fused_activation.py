"""What the oracle and the kernels of the fused pre-activation chain agree on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_n2uq.ops.tables import output_step


class Norm(NamedTuple):
    """A batch norm of one batch, `[C]` float32 each: `x * scale + shift`.

    Attributes:
        mean: of the batch.
        inverse: `1 / sqrt(variance + eps)`.
        scale: `gamma * inverse`.
        shift: `beta - mean * scale`.
    """

    mean: Tensor
    inverse: Tensor
    scale: Tensor
    shift: Tensor


class Activation(NamedTuple):
    """Bias, PReLU slope, bias: `[C]` each."""

    bias_in: Tensor
    slope: Tensor
    bias_out: Tensor


def batch_norm(stats: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Norm:
    """The norm that a batch's statistics give; forward and backward must compute the very same numbers.

    Args:
        stats: `[2, C]` float32, mean and biased variance.
        gamma: `[C]`.
        beta: `[C]`.
        eps: added to the variance.
    """
    mean, variance = stats.unbind(0)
    inverse = (variance.double() + eps).pow(-0.5).float()  # sqrt would start MKL threads for a few numbers
    scale = gamma.detach().float() * inverse
    return Norm(mean, inverse, scale, beta.detach().float() - mean * scale)


def packed_bytes(pixels: int, bits: int) -> int:
    """Bytes of one plane: `bits` bit planes of `ceil(pixels / 8)` bytes, and one that flags NaN."""
    return bits * -(-pixels // 8) + 1


def planes(x: Tensor) -> Tensor:
    """`[N, C, ...]` as contiguous `[N, C, P]` float32."""
    return x.detach().float().reshape(*x.shape[:2], -1).contiguous()


def output_table(scale_out: Tensor, bits: int) -> Tensor:
    """`beta * D * q` `[2^b]` float32: the `outputs` of `threshold_tables`."""
    n = 2**bits - 1
    levels = torch.arange(n + 1, dtype=torch.float64, device=scale_out.device) * output_step(n)
    return (levels * scale_out.detach().double().reshape(())).float()
