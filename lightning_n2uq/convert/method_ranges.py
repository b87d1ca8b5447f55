"""What a range means to each activation method: which one fits a sample, and which parameters make it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_n2uq.quantizers import (
    EWGS,
    LCQ,
    LSQ,
    PACT,
    APoT,
    DoReFa,
    LearnableThresholdQuantizer,
    LSQPlus,
    NuLSQ,
    Quantizer,
)
from lightning_n2uq.quantizers.base import write_parameter
from lightning_n2uq.quantizers.ranges import best_range, best_symmetric_range

_METHODS = ("LearnableThresholdQuantizer", "PACT", "APoT", "DoReFa", "LSQ", "NuLSQ", "LCQ", "EWGS")


def is_signed(method: nn.Module) -> bool:
    """Returns whether a method's levels lie on both sides of zero without an offset."""
    return isinstance(method, LSQ) and method.signed


def method_range(method: Quantizer, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the range that fits a sample `[..., S]` by least squared error, ends `[...]`."""
    best = best_symmetric_range if is_signed(method) else best_range
    return best(sample, method.num_levels)


@torch.no_grad()
def set_method_range(method: Quantizer, low: Tensor, high: Tensor) -> None:
    """Makes a method's levels go over the range `high - low` (0-d); DoReFa's go from 0 to 1 always."""
    span = high - low
    if isinstance(method, LearnableThresholdQuantizer):
        _fill(method, "scale_in", 2.0 / span)
        _fill(method, "scale_out", span / 2.0)
    elif isinstance(method, PACT | APoT | LCQ):
        _fill(method, "clip", span)
    elif isinstance(method, EWGS):
        _fill(method, "lower", torch.zeros(()))
        _fill(method, "upper", torch.ones(()))
        method._note_fitted()
    elif isinstance(method, NuLSQ):
        _fill(method, "steps", span / (method.num_levels - 1))
        method._note_fitted()
    elif isinstance(method, LSQ):
        _fill(method, "step", span / (method.num_levels - 1))
        if isinstance(method, LSQPlus):
            _fill(method, "offset", low)
        method._note_fitted()
    elif not isinstance(method, DoReFa):
        raise ValueError(f"inner: got {type(method).__name__}, allowed are {', '.join(_METHODS)}")


def _fill(method: nn.Module, name: str, value: Tensor) -> None:
    write_parameter(method.get_parameter(name), value)
