"""Which layers compute with integers in training, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from lightning_n2uq.ops.dispatch import Backend
from lightning_n2uq.ops.formats.integer import IntegerRange
from lightning_n2uq.ops.integer import exact_backend, integer_obstacle
from lightning_n2uq.quantizers.base import Quantizer
from lightning_n2uq.quantizers.ewgs import EWGS
from lightning_n2uq.utils.compat import has_hooks

_TERMS = 9 * 512  # products in a sum of a large layer
FEWEST = 2**23  # multiplications of a convolution below which its call costs more than integers save


def integer_backend(conv: nn.Conv2d, x: Tensor) -> Backend:
    """Returns the backend that trains `conv` on integers; `reference` stands for floats.

    Args:
        conv: A convolution with quantizers, zero padding given in numbers.
        x: Its input, `[N, C, H, W]`.
    """
    size = _range(conv)
    if size is None or _small(conv, x.shape):
        return "reference"
    return exact_backend(x.device, *size)


def integer_weight_known(conv: nn.Conv2d) -> bool:
    """Returns whether the weight quantizer tells its integers; a hook may change its value."""
    quantizer = conv.weight_quantizer
    known = isinstance(quantizer, Quantizer) and quantizer.tells_weight_grid and quantizer.largest_level > 0
    return known and not has_hooks(quantizer)  # type: ignore[arg-type]


def float_layers(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Gives name and reason of every quantized layer that trains in floats on its device.

    Layers whose inputs are too small to gain are not told from others, since that depends on the input.
    """
    for name, module in model.named_modules():
        if hasattr(module, "weight_quantizer") and (reason := float_reason(module)) is not None:
            yield name, reason


def float_reason(layer: nn.Module, shape: torch.Size | None = None) -> str | None:
    """Returns why a layer trains in floats on its device, None if it does not.

    Args:
        layer: A layer with a weight quantizer and an activation quantizer.
        shape: Of its input in training; None leaves out reasons that depend on the moment: a small input,
            thresholds that are being annealed.
    """
    reason = _reason(layer)
    if reason is not None or shape is None:
        return reason
    if getattr(layer.activation_quantizer, "ramp", 0.0) > 0:
        return "thresholds are being annealed"
    if isinstance(layer, nn.Conv2d) and _small(layer, shape):
        return f"fewer than {FEWEST:,} multiplications in a batch"
    return None


def by_reason(layers: Iterable[tuple[str, str]]) -> list[str]:
    """Returns a line per reason, which names the first layers; `layers` are names and reasons."""
    found: dict[str, list[str]] = {}
    for name, reason in layers:
        found.setdefault(reason, []).append(name)
    return [f"{_listed(names)}: {reason}" for reason, names in found.items()]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def exact_widths(device: torch.device) -> list[tuple[int, int]]:
    """Returns the widest pairs of bits, of activations and of N2UQ's weights, that add up exactly."""
    exact = [(a, w) for a in range(2, 9) for w in range(2, 8) if _fits(a, w, device)]
    return [(a, w) for a, w in exact if not {(a + 1, w), (a, w + 1)} & set(exact)]


def _fits(activation_bits: int, weight_bits: int, device: torch.device) -> bool:
    size = IntegerRange(2**activation_bits - 1, 2**weight_bits - 1, _TERMS)
    return integer_obstacle(size, device) is None


def _reason(layer: nn.Module) -> str | None:
    activation, weight = layer.activation_quantizer, layer.weight_quantizer
    if not isinstance(layer, nn.Conv2d):
        return f"{type(layer).__name__} has no integer training"
    if not isinstance(activation, Quantizer) or not activation.tells_grid:
        method = getattr(activation, "name", type(activation).__name__)
        why = "have scaled gradients" if isinstance(activation, EWGS) else "are not uniform"
        return f"activations of {method} {why}"
    if not integer_weight_known(layer):
        return f"weights of {getattr(weight, 'name', type(weight).__name__)} are not integers of 8 bits"
    if layer.padding_mode != "zeros" or not isinstance(layer.padding, tuple):
        return f"padding {layer.padding!r} in mode {layer.padding_mode!r}"
    if layer.weight.dtype == torch.float64:
        return "float64"
    if getattr(activation, "comparison", ">") != ">":
        return f"activations are compared with {activation.comparison!r}"
    size = _range(layer)
    return None if size is None else integer_obstacle(size, layer.weight.device)


def _small(conv: nn.Conv2d, shape: torch.Size) -> bool:
    """Returns whether a call costs more than integers save, for an input `[N, C, H, W]`."""
    return shape[0] * shape[2:].numel() * conv.weight.numel() < FEWEST


def _range(conv: nn.Conv2d) -> IntegerRange | None:
    activation, weight = conv.activation_quantizer, conv.weight_quantizer
    if not (
        isinstance(activation, Quantizer) and isinstance(weight, Quantizer) and integer_weight_known(conv)
    ):
        return None
    return IntegerRange(activation.num_levels - 1, weight.largest_level, conv.weight.shape[1:].numel())
