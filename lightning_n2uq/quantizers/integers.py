"""What evenly spaced quantizers are on integers: levels as integers times a scale, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_n2uq.ops.tables import output_step
from lightning_n2uq.quantizers.dorefa import DoReFa, DoReFaWeight
from lightning_n2uq.quantizers.ewgs import EWGS
from lightning_n2uq.quantizers.grid import UniformGrid
from lightning_n2uq.quantizers.integer_levels import IntegerLevels
from lightning_n2uq.quantizers.lsq import LSQ, LSQPlus
from lightning_n2uq.quantizers.n2uq import EntropyPreservingWeightQuantizer, LearnableThresholdQuantizer
from lightning_n2uq.quantizers.pact import PACT


class WeightIntegers(NamedTuple):
    """A quantized weight is `integers * scale`.

    Attributes:
        integers: The integers, in the shape of the weight, int16.
        scale: The scale of each output channel, float64 `[O]`.
        odd: Whether levels are the odd integers `-n .. n`, `n = 2^bits - 1`, and not `-2^(bits - 1)` upwards.
    """

    integers: Tensor
    scale: Tensor
    odd: bool


@torch.no_grad()
def weight_integers(quantizer: nn.Module, weight: Tensor) -> WeightIntegers | None:
    """Returns the integers that evaluation uses, or None where levels are no integers times a scale."""
    if isinstance(quantizer, IntegerLevels):
        integers, scale = quantizer.integers(weight)
        return WeightIntegers(integers, scale.double(), quantizer.odd)
    ones = torch.ones(len(weight), dtype=torch.float64, device=weight.device)
    if isinstance(quantizer, EntropyPreservingWeightQuantizer):
        odd, scale = True, quantizer.scale(weight).double().reshape(-1)
    elif isinstance(quantizer, DoReFaWeight):
        odd, scale = True, ones / (quantizer.num_levels - 1) * bool(weight.any())
    elif isinstance(quantizer, LSQ) and quantizer.signed:
        (step,) = quantizer.asked(weight, "step")
        odd, scale = False, ones * step.double()
    elif isinstance(quantizer, UniformGrid) and quantizer.signed:
        return WeightIntegers(
            quantizer.codes(weight).to(torch.int16) + quantizer.low, ones * quantizer.step(weight), False
        )
    else:
        return None
    codes = quantizer.codes(weight).to(torch.int16)
    bits = quantizer.bits
    return WeightIntegers(codes * 2 - (2**bits - 1) if odd else codes - 2 ** (bits - 1), scale, odd)


def level_distance(quantizer: nn.Module, x: Tensor) -> Tensor | None:
    """Returns the distance of an activation quantizer's levels, float64, or None where zero is no level.

    Quantized values are integers times it. LSQ+ has an offset, APoT uneven levels: both give None.

    Args:
        quantizer: An activation quantizer.
        x: Its input, which decides where it has not seen any data in training.
    """
    if isinstance(quantizer, UniformGrid):
        return quantizer.step(x)
    if isinstance(quantizer, LearnableThresholdQuantizer):
        return quantizer.scale_out.detach().double().reshape(()) * output_step(quantizer.num_levels - 1)
    if isinstance(quantizer, LSQ) and not isinstance(quantizer, LSQPlus):
        return quantizer.asked(x, "step")[0].detach().double().reshape(())
    if isinstance(quantizer, PACT):
        return (quantizer.bounded("clip").detach() / (quantizer.num_levels - 1)).double().reshape(())
    if isinstance(quantizer, DoReFa | EWGS):
        return torch.tensor(1.0 / (quantizer.num_levels - 1), dtype=torch.float32).double()
    return None
