"""Layers whose quantized weight is the nearest of evenly spaced levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_n2uq.callbacks._common.quantized_layers import QuantizedLayer, matching_layers
from lightning_n2uq.quantizers import (
    LSQ,
    SEQ,
    WEIGHT_QUANTIZERS,
    BinaryWeight,
    EntropyPreservingWeightQuantizer,
    LeastErrorWeight,
    StatsQ,
    quantizer_type,
)

_EVEN = (EntropyPreservingWeightQuantizer, LeastErrorWeight, LSQ, StatsQ, SEQ, BinaryWeight)


def names() -> list[str]:
    """Returns the names of these methods in configs."""
    kinds = {name: quantizer_type(build) for name, build in WEIGHT_QUANTIZERS.items()}
    return [name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, _EVEN)]


def layers_with_even_weights(
    model: nn.Module, patterns: Sequence[str], *, writable: bool = False
) -> list[QuantizedLayer]:
    """Returns the layers among those that match.

    Args:
        model: The model to search.
        patterns: The user's argument `layers`, see `matching_layers`.
        writable: Whether only layers count whose weight is a parameter, not computed from others.

    Raises:
        ValueError: No layer is left, or a pattern matches none.
    """
    found = [
        layer
        for layer in matching_layers(model, patterns, "layers")
        if isinstance(layer.weight_quantizer, _EVEN)
        and (not writable or isinstance(layer.weight, nn.Parameter))
    ]
    if not found:
        raise ValueError(
            "layers: none of the chosen layers has weights on the nearest of evenly spaced levels "
            f"({', '.join(names())})"
        )
    return found


def ends(quantizer: Any, odd: bool) -> tuple[int, int]:  # noqa: ANN401
    """Returns the lowest and the highest of the integers that `weight_integers` gives for such weights."""
    if odd:
        return 1 - quantizer.num_levels, quantizer.num_levels - 1
    if isinstance(quantizer, LSQ):
        return quantizer.low, quantizer.high
    return quantizer.lowest, -quantizer.lowest
