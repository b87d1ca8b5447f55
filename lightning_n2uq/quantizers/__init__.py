"""Quantizers behind one interface, chosen by name: one key for weights, one for activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from lightning_n2uq.quantizers.apot import APoT, APoTWeight
from lightning_n2uq.quantizers.base import (
    MAX_BITS,
    MIN_BITS,
    FullPrecision,
    Quantizer,
    check_bits,
    quantizer_parameters,
)
from lightning_n2uq.quantizers.binary import BinaryWeight
from lightning_n2uq.quantizers.dorefa import DoReFa, DoReFaWeight
from lightning_n2uq.quantizers.ewgs import EWGS, EWGSWeight
from lightning_n2uq.quantizers.grid import UniformGrid
from lightning_n2uq.quantizers.lcq import LCQ, LCQWeight
from lightning_n2uq.quantizers.least_error import LeastErrorWeight
from lightning_n2uq.quantizers.lsq import LSQ, LSQPlus, SignedLSQ
from lightning_n2uq.quantizers.n2uq import (
    EntropyPreservingWeightQuantizer,
    FixedThresholdQuantizer,
    LearnableThresholdQuantizer,
)
from lightning_n2uq.quantizers.nulsq import NuLSQ
from lightning_n2uq.quantizers.pact import PACT
from lightning_n2uq.quantizers.seq import SEQ, SEQTernary
from lightning_n2uq.quantizers.statsq import StatsQ
from lightning_n2uq.quantizers.ternary import TernaryWeight
from lightning_n2uq.utils.validation import check, check_choice

ACTIVATION_QUANTIZERS: dict[str, Callable[..., nn.Module]] = {
    "n2uq": LearnableThresholdQuantizer,
    "n2uq_fixed": FixedThresholdQuantizer,
    "lsq": LSQ,
    "lsq_signed": SignedLSQ,
    "lsq_plus": LSQPlus,
    "pact": PACT,
    "dorefa": DoReFa,
    "apot": APoT,
    "nulsq": NuLSQ,
    "lcq": LCQ,
    "ewgs": EWGS,
    "float": FullPrecision,
}
"""Activation quantizers by config name."""

WEIGHT_QUANTIZERS: dict[str, Callable[..., nn.Module]] = {
    "n2uq": EntropyPreservingWeightQuantizer,
    "lsq": partial(LSQ, signed=True),
    "lsq_plus": partial(LSQPlus, signed=True),
    "dorefa": DoReFaWeight,
    "apot": APoTWeight,
    "nulsq": partial(NuLSQ, signed=True),
    "lcq": LCQWeight,
    "ewgs": EWGSWeight,
    "statsq": StatsQ,
    "least_error": LeastErrorWeight,
    "seq": SEQ,
    "seq_ternary": SEQTernary,
    "ternary": TernaryWeight,
    "binary": BinaryWeight,
    "float": FullPrecision,
}
"""Weight quantizers by config name. PACT has none of its own: its paper uses DoReFa's."""


def _build(registry: dict[str, Callable[..., nn.Module]], key: str, name: str, bits: int) -> nn.Module:
    check_choice(f"{key}_quantizer", name, registry)
    if name == "float":
        check(bits == 32, f"{key}_bits", bits, f"is 32 with {key}_quantizer 'float'")
    elif (widths := allowed_bits(registry[name])) == (MIN_BITS, MAX_BITS):
        check_bits(bits, f"{key}_bits")
    else:
        low, high = widths
        options = f"is {low}" if low == high else f"is {low} to {high}"
        right = type(bits) is int and low <= bits <= high
        check(right, f"{key}_bits", bits, f"{options} with {key}_quantizer {name!r}")
    return registry[name](bits)


def allowed_bits(build: Callable[..., nn.Module]) -> tuple[int, int]:
    """Returns the smallest and the largest code width of an entry of the registries, both 32 for `float`."""
    widths: tuple[int, int] = getattr(quantizer_type(build), "widths_allowed", (32, 32))
    return widths


def quantizer_type(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Returns the class of an entry of the registries."""
    return build.func if isinstance(build, partial) else build


def activation_quantizer(name: str, bits: int) -> nn.Module:
    """Builds the activation quantizer `name` with `bits` bits; `ValueError` names what is wrong."""
    return _build(ACTIVATION_QUANTIZERS, "activation", name, bits)


def weight_quantizer(name: str, bits: int, channels: int | None = None) -> nn.Module:
    """Builds the weight quantizer `name` with `bits` bits; `ValueError` names what is wrong.

    Args:
        name: A key of `WEIGHT_QUANTIZERS`.
        bits: The code width.
        channels: The number of output channels of the weight, for methods that learn a number for each; None
            stands for one number for all.
    """
    quantizer = _build(WEIGHT_QUANTIZERS, "weight", name, bits)
    if channels is not None and isinstance(quantizer, Quantizer):
        quantizer.set_channels(channels)
    return quantizer


__all__ = [
    "ACTIVATION_QUANTIZERS",
    "EWGS",
    "LCQ",
    "LSQ",
    "PACT",
    "SEQ",
    "WEIGHT_QUANTIZERS",
    "APoT",
    "APoTWeight",
    "BinaryWeight",
    "DoReFa",
    "DoReFaWeight",
    "EWGSWeight",
    "EntropyPreservingWeightQuantizer",
    "FixedThresholdQuantizer",
    "FullPrecision",
    "LCQWeight",
    "LSQPlus",
    "LearnableThresholdQuantizer",
    "LeastErrorWeight",
    "NuLSQ",
    "Quantizer",
    "SEQTernary",
    "SignedLSQ",
    "StatsQ",
    "TernaryWeight",
    "UniformGrid",
    "activation_quantizer",
    "allowed_bits",
    "quantizer_parameters",
    "quantizer_type",
    "weight_quantizer",
]
