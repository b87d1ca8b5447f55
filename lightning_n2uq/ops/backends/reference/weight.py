"""The weight quantizer in plain torch, with the functions that every backend has."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_n2uq.ops import reference


def quantize(weight: Tensor, scale: Tensor, bits: int, measure: bool, dtype: torch.dtype) -> Tensor:
    """Returns the quantized weight.

    Args:
        weight: The weight `[C, ...]`; every other backend wants each channel to be one run of memory.
        scale: The scale `S` `[C, 1, ..]` in the compute dtype; read, or with `measure` written.
        bits: The code width, 1 to 8.
        measure: Whether the scale is to be found.
        dtype: The dtype of the result.
    """
    if measure:
        scale.copy_(reference.weight_scale(weight, bits))
    return torch.empty_like(weight, dtype=dtype).copy_(reference.quantize_weight(weight, bits))


def levels(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns the odd integers `-n .. n` of the quantized weight, int8, and the scale `S` `[C, 1, ..]`.

    Args:
        weight: The weight `[C, ...]`, computed in float32.
        bits: The code width, 1 to 7.
    """
    wide = weight.detach().contiguous().float()
    scale = reference.weight_scale(wide, bits)
    return reference.codes_of_scale(wide, scale, bits).to(torch.int8), scale


def gradient(grad: Tensor, scale: Tensor, dtype: torch.dtype, owned: bool) -> Tensor:
    """Returns `grad` divided by the scale, and by 1 for a channel of zeros, which has none.

    Args:
        grad: The gradient of the quantized weight, `[C, ...]`.
        scale: The scale `S` `[C, 1, ..]`.
        dtype: The dtype of the result.
        owned: Whether `grad` may be overwritten.
    """
    divisor, wide = torch.where(scale == 0, 1.0, scale), grad.to(scale.dtype)
    return (wide.div_(divisor) if owned else wide / divisor).to(dtype)
