"""Trained weights as integers and scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_n2uq.convert.calibrated import RescaledWeight
from lightning_n2uq.export.ir.packing import from_codes
from lightning_n2uq.export.lower.builder import check_finite
from lightning_n2uq.quantizers import LSQ, DoReFaWeight, EntropyPreservingWeightQuantizer


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
    if isinstance(quantizer, EntropyPreservingWeightQuantizer):
        odd, scale = True, quantizer.scale(weight).double().reshape(-1).numpy()
    elif isinstance(quantizer, DoReFaWeight):
        odd, scale = True, np.full(len(weight), 1.0 / (quantizer.num_levels - 1))
        if not bool(weight.any()):
            scale = np.zeros(len(weight))
    elif isinstance(quantizer, LSQ) and quantizer.signed:
        (step,) = quantizer.current(weight, "step")
        odd, scale = False, np.full(len(weight), step.double().item())
    else:
        method = getattr(quantizer, "name", type(quantizer).__name__)
        raise ValueError(
            f"{name}: weight quantizer {method!r} has no integer levels; exportable are n2uq, lsq, lsq_plus, "
            "dorefa and float"
        )
    codes = quantizer.codes(weight).numpy()
    return IntegerWeight(from_codes(codes, quantizer.bits, odd), scale, quantizer.bits, odd)
