"""Fit the input quantizers of a converted network to a few batches of data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from lightning_n2uq.convert.calibrated import CalibratedInput
from lightning_n2uq.convert.ranges import best_range, sample_values
from lightning_n2uq.quantizers import Quantizer
from lightning_n2uq.quantizers.base import DataInitializedQuantizer

MAX_BATCHES = 8


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor | tuple[Tensor, ...] | list[Tensor]],
    max_batches: int = MAX_BATCHES,
) -> dict[str, tuple[float, float]]:
    """Runs `batches` through the float network and fits every input range by least squared error.

    The network runs in evaluation mode with all quantizers off, so that early layers do not distort the
    statistics of later ones. Weight quantizers that learn from data are set from the weights.

    Args:
        model: A network after `quantize_model`; its training mode is restored.
        batches: Inputs, alone or first in a tuple; they are moved to the model's device.
        max_batches: The largest number of batches to use.

    Returns:
        Ranges by name of the quantizer, without those that no batch reached.

    Raises:
        ValueError: There is no batch, or values are not finite.
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, CalibratedInput)}
    samples: dict[nn.Module, list[Tensor]] = defaultdict(list)
    device = next(model.parameters()).device
    seen = 0
    with _evaluating(model), _quantizers_off(model, samples):
        for batch in islice(batches, max_batches):
            images = batch if isinstance(batch, Tensor) else batch[0]
            model(images.to(device))
            seen += 1
    if seen == 0:
        raise ValueError("batches: got none, allowed is at least one")
    ranges = {}
    for quantizer, name in names.items():
        if quantizer in samples:
            low, high = best_range(torch.cat(samples[quantizer]), quantizer.num_levels)
            quantizer.set_range(low, high)
            ranges[name] = (float(low), float(high))
    _set_weight_quantizers(model)
    return ranges


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _quantizers_off(model: nn.Module, samples: dict[nn.Module, list[Tensor]]) -> Iterator[None]:
    """Lets tensors through all quantizers unchanged, and collects what the calibrated ones see."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, Quantizer):
                module.forward = _Tap(samples[module] if isinstance(module, CalibratedInput) else None)
                stack.callback(module.__dict__.pop, "forward")
        yield
    for module in [m for m, values in samples.items() if not values]:
        del samples[module]


class _Tap:
    def __init__(self, values: list[Tensor] | None) -> None:
        self.values = values

    def __call__(self, x: Tensor) -> Tensor:
        if self.values is not None:
            self.values.append(sample_values(x))
        return x


def _set_weight_quantizers(model: nn.Module) -> None:
    for module in model.modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if isinstance(quantizer, DataInitializedQuantizer):
            weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
            quantizer.initialize(weight)  # type: ignore[arg-type]
