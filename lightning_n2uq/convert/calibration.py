"""Fit the input quantizers of a converted network to a few batches of data."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_n2uq.convert.ranged_input import RangedInput
from lightning_n2uq.layers.quant import effective_weight
from lightning_n2uq.quantizers import Quantizer
from lightning_n2uq.quantizers.base import DataInitializedQuantizer
from lightning_n2uq.utils.compat import tree_map

MAX_BATCHES = 8


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    max_batches: int = MAX_BATCHES,
    forward: Callable[[Any], object] | None = None,
) -> dict[str, tuple[float, float]]:
    """Runs `batches` through the float network and fits every input range by least squared error.

    The network runs in evaluation mode with all quantizers off, so that early layers do not distort the
    statistics of later ones. Weight quantizers that learn from data are set from the weights.

    Args:
        model: A network after `quantize_model`; its training mode is restored.
        batches: The model's input alone, or first in a tuple or list, or keywords in a mapping, of which the
            model gets those that it takes; tensors inside are moved to the model's device.
        max_batches: The largest number of batches to use.
        forward: How to run a batch on the model, where the above does not fit; it gets the batch as it is.

    Returns:
        Ranges by name of the quantizer, without those that no batch reached.

    Raises:
        ValueError: There is no batch, or values are not finite.
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, RangedInput)}
    samples: dict[nn.Module, list[Tensor]] = defaultdict(list)
    device = next(model.parameters()).device
    seen = 0
    with evaluating(model), quantizers_off(model, samples):
        for batch in islice(batches, max_batches):
            if forward is None:
                run_batch(model, batch, device)
            else:
                forward(batch)
            seen += 1
    if seen == 0:
        raise ValueError("batches: got none, allowed is at least one")
    ranges = {}
    for quantizer, name in names.items():
        if quantizer in samples:
            low, high = quantizer.range_of(torch.cat(samples[quantizer], -1))
            quantizer.set_range(low, high)
            ranges[name] = (float(low.min()), float(high.max()))
    set_weight_quantizers(model)
    return ranges


def run_batch(model: nn.Module, batch: Any, device: torch.device) -> object:  # noqa: ANN401
    """Calls `model` with a batch: a tensor, the first entry of a tuple or list, or keywords of a mapping."""
    batch = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, _plain(batch))
    if isinstance(batch, dict):
        return model(**taken(model, batch))
    return model(batch if isinstance(batch, Tensor) else batch[0])


def _plain(batch: Any) -> Any:  # noqa: ANN401
    """Returns mappings of other kinds, such as Hugging Face's `BatchEncoding`, as a dictionary."""
    if isinstance(batch, Mapping):
        return dict(batch)
    fits = isinstance(batch, Tensor) or (isinstance(batch, (tuple, list)) and len(batch) > 0)
    if not fits:
        raise ValueError(
            f"batches: got a {type(batch).__name__}, allowed are tensors, tuples and lists that begin with "
            "the input, mappings of keywords, or anything with `forward`"
        )
    return batch


def taken(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of a batch that the model's `forward` takes: batches also hold labels."""
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return batch
    found = {key: value for key, value in batch.items() if key in parameters}
    if not found:
        raise ValueError(
            f"batches: got the keys {', '.join(map(str, batch))}, allowed are {', '.join(parameters)}"
        )
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode meanwhile."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def quantizers_off(model: nn.Module, samples: dict[nn.Module, list[Tensor]]) -> Iterator[None]:
    """Lets tensors through all quantizers unchanged, and collects samples of what those with ranges see."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, Quantizer):
                module.forward = _Tap(module, samples[module] if isinstance(module, RangedInput) else None)
                stack.callback(module.__dict__.pop, "forward")
        yield
    for module in [m for m, values in samples.items() if not values]:
        del samples[module]


class _Tap:
    def __init__(self, quantizer: Quantizer, values: list[Tensor] | None) -> None:
        self.quantizer, self.values = quantizer, values

    def __call__(self, x: Tensor) -> Tensor:
        if self.values is not None and isinstance(self.quantizer, RangedInput):
            self.values.append(self.quantizer.sample(x))
        return x


def set_weight_quantizers(model: nn.Module, again: bool = True) -> None:
    """Sets weight quantizers that learn from data from their weights; fitted ones only `again`."""
    for module in model.modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if isinstance(quantizer, DataInitializedQuantizer) and (again or not quantizer.fitted):
            attention = isinstance(module, nn.MultiheadAttention)
            weight = module.in_proj_weight if attention else effective_weight(module)
            quantizer.initialize(weight)  # type: ignore[arg-type]
