"""A copy of a trained network whose quantized layers work on integers; what stays float is listed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_n2uq.convert.attention import QuantMultiheadAttention
from lightning_n2uq.convert.attention_products import AttentionProducts
from lightning_n2uq.convert.convolutions import QuantConv1D
from lightning_n2uq.export.lower.weights import integer_weight
from lightning_n2uq.export.program.attention import DeployedProducts
from lightning_n2uq.export.program.layers import (
    DeployedAttention,
    DeployedConv,
    DeployedLinear,
    DeployedQuantizer,
)
from lightning_n2uq.export.program.staircases import staircase
from lightning_n2uq.quantizers.turned import TurnedWeight
from lightning_n2uq.utils.compat_lightning import attached_trainer

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Deployed:
    """A deployed copy and what became of each layer with quantizers.

    Attributes:
        model: The copy, in evaluation mode, on the CPU, in float32.
        integer: Names of the layers that work on integers.
        floating: Names of those that do not, with the reason.
    """

    model: nn.Module
    integer: list[str] = field(default_factory=list)
    floating: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Returns one line about integers, and one per layer that stays float."""
        lines = [f"integer arithmetic: {len(self.integer)} layers"]
        return "\n".join([*lines, *(f"float: {name} ({why})" for name, why in self.floating.items())])


@torch.no_grad()
def deploy(model: nn.Module) -> Deployed:
    """Copies a trained network and turns its quantized layers into integer ones.

    The copy computes what evaluation computes: the same codes for the same inputs, and sums that are exact
    where a float layer rounds. Weights that have no integers are replaced by their quantized values.

    Args:
        model: Any network with layers of `quantize_model` or of this package; it is left as it is.

    Raises:
        ValueError: Nothing in it is quantized, or a quantizer was never fitted or holds no finite numbers.
    """
    # Without the trainer of a LightningModule, which holds the data.
    network = copy.deepcopy(model, {id(attached_trainer(model)): None}).cpu().float().eval()
    result = Deployed(network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, AttentionProducts):
            _replace_products(result, name, layer)
    for name, layer in list(network.named_modules()):
        if hasattr(layer, "weight_quantizer") and hasattr(layer, "activation_quantizer"):
            _replace(result, name, layer)
    if not result.integer and not result.floating:
        raise ValueError(f"model: {type(model).__name__} has no quantized layer, convert and train it first")
    return result


def _replace(result: Deployed, name: str, layer: nn.Module) -> None:
    """Puts a layer's deployed form in its place, or makes its quantizers ones that can be exported."""
    quantizer = _deployed_quantizer(layer.activation_quantizer, name)  # type: ignore[arg-type]
    new: nn.Module | None = None
    if quantizer is None:
        result.floating[name] = "its input is not quantized"
    elif not quantizer.stairs.uniform:
        result.floating[name] = "levels of its input are not evenly spaced"
    else:
        try:
            new = _integer_layer(layer, quantizer, name)
            result.integer.append(name)
        except ValueError as error:
            result.floating[name] = str(error).partition(": ")[2] or str(error)
    if new is None:
        _keep_float(layer, quantizer)
    else:
        _put(result.model, layer, new)


def _put(model: nn.Module, layer: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):  # a layer may have several places
        for own, child in parent.named_children():
            if child is layer:
                setattr(parent, own, new)


def _replace_products(result: Deployed, name: str, layer: AttentionProducts) -> None:
    """Puts the deployed form of attention's products in their place."""
    new = DeployedProducts(layer, name)
    if new.uniform:
        result.integer.append(name)
    else:
        result.floating[name] = "levels of its operands are not evenly spaced"
    _put(result.model, layer, new)


def _integer_layer(layer: nn.Module, quantizer: DeployedQuantizer, name: str) -> nn.Module:
    """Returns a layer's integer form.

    Raises:
        ValueError: It has none; the message says why, behind the layer's name.
    """
    if getattr(layer.weight_quantizer, "name", "") == "float":
        raise ValueError(f"{name}: its weight is not quantized")
    if isinstance(layer, QuantMultiheadAttention):
        return _attention(layer, quantizer, name)
    if isinstance(layer, nn.Linear):
        weight = integer_weight(layer.weight_quantizer, layer.weight, name)  # type: ignore[arg-type]
        return DeployedLinear(quantizer, weight, layer.bias)
    if isinstance(layer, QuantConv1D):  # a linear layer whose weight is `[in, out]`
        turned = layer.weight_quantizer
        assert isinstance(turned, TurnedWeight)
        return DeployedLinear(
            quantizer, integer_weight(turned.inner, turned.channels_first(layer.weight), name), layer.bias
        )
    if isinstance(layer, _CONVOLUTIONS):
        weight = integer_weight(layer.weight_quantizer, layer.weight, name)  # type: ignore[arg-type]
        return DeployedConv(quantizer, weight, layer)
    raise ValueError(f"{name}: {type(layer).__name__} has no integer form")


def _attention(layer: QuantMultiheadAttention, quantizer: DeployedQuantizer, name: str) -> nn.Module:
    weight = integer_weight(layer.weight_quantizer, layer.in_proj_weight, name)
    parts, width = [], layer.embed_dim
    for index in range(3):
        rows = slice(index * width, (index + 1) * width)
        part = type(weight)(weight.integers[rows], weight.scale[rows], weight.bits, weight.odd)
        bias = None if layer.in_proj_bias is None else layer.in_proj_bias[rows]
        parts.append(DeployedLinear(quantizer, part, bias))
    return DeployedAttention(layer, parts)


def _deployed_quantizer(quantizer: nn.Module, name: str) -> DeployedQuantizer | None:
    """Returns an activation quantizer's deployed form, None for one that leaves values as they are."""
    if getattr(quantizer, "name", "") == "float":
        return None
    return DeployedQuantizer(staircase(quantizer, name), name)


class _Fixed(nn.Module):
    """A weight quantizer whose answer is known: a trained weight does not change."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the quantized weight."""
        return self.value


def _keep_float(layer: nn.Module, quantizer: DeployedQuantizer | None) -> None:
    name = "in_proj_weight" if isinstance(layer, QuantMultiheadAttention) else "weight"
    quantize: Callable[[Tensor], Tensor] = layer.weight_quantizer  # type: ignore[assignment]
    layer.weight_quantizer = _Fixed(quantize(getattr(layer, name)).detach())
    layer.activation_quantizer = nn.Identity() if quantizer is None else quantizer
