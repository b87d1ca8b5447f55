"""One layer of a network quantized for a while: fitted to data, then as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_n2uq.convert.calibrated import CalibratedInput
from lightning_n2uq.convert.calibration import quantizers_off, set_weight_quantizers
from lightning_n2uq.convert.candidates import candidates
from lightning_n2uq.convert.fitted import quantizers_for
from lightning_n2uq.convert.policy import Layer, Policy
from lightning_n2uq.convert.quantize import swap
from lightning_n2uq.convert.replace import ALREADY, obstacle, quantized
from lightning_n2uq.convert.widths import Width, at_width
from lightning_n2uq.layers import QuantConv2d, QuantLinear, QuantSpec
from lightning_n2uq.layers.quant import effective_weight
from lightning_n2uq.quantizers import LSQ, Quantizer

_CANDIDATES = 32


@dataclass(frozen=True)
class Candidate:
    """A layer that may get any width.

    Attributes:
        layer: Its name and place.
        module: The module.
        spec: The methods that the policy gives it, which training would use.
        weights: The number of its weights.
    """

    layer: Layer
    module: nn.Module
    spec: QuantSpec
    weights: int


def find(model: nn.Module, policy: Policy, example: Any) -> tuple[list[Candidate], dict[str, str]]:  # noqa: ANN401
    """Returns the layers that `policy` quantizes, in order, and reasons of the others by name."""
    found, left_out = [], {}
    for module, layer in candidates(model, policy.modules, example).items():
        spec, reason = policy.decide(layer)
        problem = obstacle(module, layer.name, model.get_submodule(layer.name.rpartition(".")[0]))
        if problem == ALREADY:
            own = isinstance(module, QuantConv2d | QuantLinear)
            problem = None if own else f"a quantized {type(module).__name__} is scored on its float network"
        if spec is None or problem is not None:
            left_out[layer.name] = reason if spec is None else str(problem)
            continue
        named = module.named_parameters()
        weights = sum(p.numel() for name, p in named if p.dim() > 1 and "quantizer" not in name)
        found.append(Candidate(layer, module, spec, weights))
    return found, left_out


class Trial:
    """Quantizes one layer at several widths, by uniform quantizers of least squared error.

    The methods that training would use need training to show what they can do; these do not.

    Args:
        model: The network, in evaluation mode.
        candidate: The layer.
        run: Runs all batches through the network as it is.
    """

    def __init__(self, model: nn.Module, candidate: Candidate, run: Callable[[], object]) -> None:
        self.model, self.candidate = model, candidate
        self.inputs: list[Tensor] = []
        with self._swapped(Width(8, 8)) as new:
            samples: dict[nn.Module, list[Tensor]] = {q: [] for q in _input_quantizers(new)}
            with quantizers_off(new, samples):
                run()
            self.inputs = [torch.cat(values) for values in samples.values() if values]

    @contextmanager
    def at(self, bits: Width) -> Iterator[None]:
        """Quantizes the layer meanwhile; one that has these bits already stays as it is."""
        if self._has(bits):
            yield
            return
        with self._swapped(bits) as new, torch.no_grad():
            for quantizer, values in zip(_input_quantizers(new), self.inputs, strict=False):
                quantizer.set_range(*quantizer.range_of(values))
            set_weight_quantizers(new)
            for module in new.modules():
                fit_step(module)
            yield

    def _has(self, bits: Width) -> bool:
        parts = [
            getattr(self.candidate.module, f"{kind}_quantizer", None) for kind in ("weight", "activation")
        ]
        return [q.bits for q in parts if isinstance(q, Quantizer)] == list(bits)

    @contextmanager
    def _swapped(self, bits: Width) -> Iterator[nn.Module]:
        module = self.candidate.module
        spec = at_width(_quickly_fitted(self.candidate.spec), bits)
        if isinstance(module, QuantConv2d | QuantLinear):
            before = module.weight_quantizer, module.activation_quantizer
            new = quantizers_for(effective_weight(module), spec)
            module.weight_quantizer, module.activation_quantizer = (q.eval() for q in new)
            try:
                yield module
            finally:
                module.weight_quantizer, module.activation_quantizer = before
            return
        other = quantized(module, spec)
        swap(self.model, {module: other})
        try:
            yield other
        finally:
            swap(self.model, {other: module})


def _quickly_fitted(spec: QuantSpec) -> QuantSpec:
    """Returns LSQ for both sides, or float where a side is in full precision."""
    methods = (spec.weight_quantizer, spec.activation_quantizer)
    weight, activation = ("float" if name == "float" else "lsq" for name in methods)
    return QuantSpec(weight_quantizer=weight, activation_quantizer=activation)


def _input_quantizers(module: nn.Module) -> Sequence[CalibratedInput]:
    return [m for m in module.modules() if isinstance(m, CalibratedInput)]


@torch.no_grad()
def fit_step(module: nn.Module) -> None:
    """Sets the step of a layer's LSQ weight quantizer to the one of least squared error; others stay."""
    quantizer = getattr(module, "weight_quantizer", None)
    if not isinstance(quantizer, LSQ):
        return
    attention = isinstance(module, nn.MultiheadAttention)
    weight = module.in_proj_weight if attention else effective_weight(module)
    largest = weight.abs().max() / quantizer.high  # type: ignore[union-attr, operator]
    errors = []
    for i in range(1, _CANDIDATES + 1):
        quantizer.step.copy_(largest * i / _CANDIDATES)
        errors.append(float((quantizer(weight) - weight).square().sum()))
    quantizer.step.copy_(largest * (1 + errors.index(min(errors))) / _CANDIDATES)
