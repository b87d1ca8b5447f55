"""A model's quantized layers: their names, and a choice among them by pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from lightning_n2uq.layers.quant import effective_weight
from lightning_n2uq.quantizers import Quantizer


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer and its quantizers.

    Attributes:
        name: The path in the model, without the leading part that all layers share (`backbone.`).
        module: The layer, whose input is what the activation quantizer sees.
    """

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """Returns the full-precision weight that is quantized; of attention, that of its projections."""
        if isinstance(self.module, nn.MultiheadAttention):
            return self.module.in_proj_weight
        return effective_weight(self.module)

    @property
    def weight_quantizer(self) -> Quantizer | None:
        """Returns the quantizer, or None where the weights stay in full precision."""
        return _quantizer(self.module, "weight_quantizer")

    @property
    def activation_quantizer(self) -> Quantizer | None:
        """Returns the method's quantizer, or None where the input stays in full precision."""
        quantizer = _quantizer(self.module, "activation_quantizer")
        return None if quantizer is None else quantizer.method

    def quantizer_input(self, x: Tensor) -> Tensor:
        """Returns what `activation_quantizer` gets where the layer gets `x`: converted layers shift it."""
        quantizer = _quantizer(self.module, "activation_quantizer")
        return x if quantizer is None else quantizer.method_input(x)


def _quantizer(module: nn.Module, attribute: str) -> Quantizer | None:
    quantizer = getattr(module, attribute, None)
    return quantizer if isinstance(quantizer, Quantizer) else None


def quantized_layers(model: nn.Module) -> list[QuantizedLayer]:
    """Returns layers with a weight or an activation quantizer, in the order of the model's definition."""
    found = {
        name: module
        for name, module in model.named_modules()
        if _quantizer(module, "weight_quantizer") or _quantizer(module, "activation_quantizer")
    }
    names = [name.split(".") for name in found]
    while names and all(len(parts) > 1 and parts[0] == names[0][0] for parts in names):
        names = [parts[1:] for parts in names]
    layers = zip(names, found.values(), strict=True)
    return [QuantizedLayer(".".join(parts), module) for parts, module in layers]


def matching_layers(model: nn.Module, patterns: Sequence[str], argument: str) -> list[QuantizedLayer]:
    """Returns quantized layers whose name matches one of the shell patterns (`layer1.*`, `*.conv2`).

    Args:
        model: The model to search.
        patterns: Patterns of `QuantizedLayer.name`; without any nothing matches.
        argument: The user's name for `patterns`, used in errors.

    Raises:
        ValueError: The model has no quantized layer, or a pattern matches none.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError(f"{argument}: {type(model).__name__} has no quantized layer")
    for pattern in patterns:
        if not any(fnmatchcase(layer.name, pattern) for layer in layers):
            names = ", ".join(layer.name for layer in layers)
            raise ValueError(f"{argument}: {pattern!r} matches no quantized layer, there are {names}")
    return [layer for layer in layers if any(fnmatchcase(layer.name, pattern) for pattern in patterns)]
