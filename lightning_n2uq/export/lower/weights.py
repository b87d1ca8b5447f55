"""Trained weights as integers and scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_n2uq.convert.calibrated import RescaledWeight
from lightning_n2uq.export.lower.builder import check_finite
from lightning_n2uq.quantizers.integers import weight_integers


@dataclass(frozen=True)
class IntegerWeight:
    """A quantized weight is `integers * scale`.

    Attributes:
        integers: Integers in the shape of the weight, int16.
        scale: Scale of each output channel, float64 `[O]`.
        bits: Width of the codes.
        odd: Whether levels are the odd integers `-n .. n`, `n = 2^bits - 1`; else they start at
            `-2^(bits - 1)`.
    """

    integers: NDArray[np.int16]
    scale: NDArray[np.float64]
    bits: int
    odd: bool


@torch.no_grad()
def integer_weight(quantizer: nn.Module, weight: Tensor, name: str) -> IntegerWeight:
    """Returns the integers that evaluation uses, and their scale in float64.

    Raises:
        ValueError: The quantizer's levels are not evenly spaced, or a weight is not finite.
    """
    weight = weight.detach().cpu()
    check_finite(name, "weights", weight.double().numpy())
    if isinstance(quantizer, RescaledWeight):
        inner = integer_weight(quantizer.inner, weight, name)
        return replace(inner, scale=inner.scale * float(quantizer.scale))
    levels = weight_integers(quantizer, weight)
    if levels is None:
        method = getattr(quantizer, "name", type(quantizer).__name__)
        raise ValueError(
            f"{name}: weight quantizer {method!r} has no integer levels; exportable are n2uq, lsq, lsq_plus, "
            "dorefa, ewgs, statsq, least_error, seq, seq_ternary, ternary, binary and float"
        )
    integers, scale = levels.integers.numpy(), levels.scale.numpy()
    return IntegerWeight(integers, scale, int(quantizer.bits), levels.odd)  # type: ignore[arg-type]
