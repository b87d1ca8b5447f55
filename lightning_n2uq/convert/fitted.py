"""Quantizers for a layer of an arbitrary network, fitted to its weight and to inputs of any range."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_n2uq.convert.calibrated import CalibratedInput, RescaledWeight
from lightning_n2uq.layers import QuantSpec
from lightning_n2uq.quantizers import APoT, DoReFaWeight, Quantizer


def quantizers_for(weight: Tensor, spec: QuantSpec) -> tuple[nn.Module, nn.Module]:
    """Returns a weight and an activation quantizer, fitted to `weight` and to inputs of any range.

    Args:
        weight: The weight, output channels first.
        spec: Methods and bits.
    """
    on_weight, on_input = spec.build(len(weight))
    if isinstance(on_weight, APoT | DoReFaWeight):
        on_weight = RescaledWeight(on_weight, weight)
    if isinstance(on_input, Quantizer):
        on_input = CalibratedInput(on_input)
    return on_weight.to(weight.device), on_input.to(weight.device)
