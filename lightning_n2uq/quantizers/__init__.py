"""Quantizers behind one interface, chosen by name: one key for weights, one for activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from lightning_n2uq.quantizers.apot import APoT, APoTWeight
from lightning_n2uq.quantizers.base import FullPrecision, Quantizer, check_bits, quantizer_parameters
from lightning_n2uq.quantizers.dorefa import DoReFa, DoReFaWeight
from lightning_n2uq.quantizers.grid import UniformGrid
from lightning_n2uq.quantizers.lsq import LSQ, LSQPlus
from lightning_n2uq.quantizers.n2uq import (
    EntropyPreservingWeightQuantizer,
    FixedThresholdQuantizer,
    LearnableThresholdQuantizer,
)
from lightning_n2uq.quantizers.pact import PACT
from lightning_n2uq.utils.validation import check, check_choice

ACTIVATION_QUANTIZERS: dict[str, Callable[..., nn.Module]] = {
    "n2uq": LearnableThresholdQuantizer,
    "n2uq_fixed": FixedThresholdQuantizer,
    "lsq": LSQ,
    "lsq_plus": LSQPlus,
    "pact": PACT,
    "dorefa": DoReFa,
    "apot": APoT,
    "float": FullPrecision,
}
"""Activation quantizers by config name."""

WEIGHT_QUANTIZERS: dict[str, Callable[..., nn.Module]] = {
    "n2uq": EntropyPreservingWeightQuantizer,
    "lsq": partial(LSQ, signed=True),
    "lsq_plus": partial(LSQPlus, signed=True),
    "dorefa": DoReFaWeight,
    "apot": APoTWeight,
    "float": FullPrecision,
}
"""Weight quantizers by config name. PACT has none of its own: its paper uses DoReFa's."""


def _build(registry: dict[str, Callable[..., nn.Module]], key: str, name: str, bits: int) -> nn.Module:
    check_choice(f"{key}_quantizer", name, registry)
    if name == "float":
        check(bits == 32, f"{key}_bits", bits, f"is 32 with {key}_quantizer 'float'")
    else:
        check_bits(bits, f"{key}_bits")
    return registry[name](bits)


def activation_quantizer(name: str, bits: int) -> nn.Module:
    """Builds the activation quantizer `name` with `bits` bits; `ValueError` names what is wrong."""
    return _build(ACTIVATION_QUANTIZERS, "activation", name, bits)


def weight_quantizer(name: str, bits: int) -> nn.Module:
    """Builds the weight quantizer `name` with `bits` bits; `ValueError` names what is wrong."""
    return _build(WEIGHT_QUANTIZERS, "weight", name, bits)


__all__ = [
    "ACTIVATION_QUANTIZERS",
    "LSQ",
    "PACT",
    "WEIGHT_QUANTIZERS",
    "APoT",
    "APoTWeight",
    "DoReFa",
    "DoReFaWeight",
    "EntropyPreservingWeightQuantizer",
    "FixedThresholdQuantizer",
    "FullPrecision",
    "LSQPlus",
    "LearnableThresholdQuantizer",
    "Quantizer",
    "UniformGrid",
    "activation_quantizer",
    "quantizer_parameters",
    "weight_quantizer",
]
