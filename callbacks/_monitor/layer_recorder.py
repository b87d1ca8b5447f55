"""Measures all layers at a step and turns the counts into records: one reduction, one device transfer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_n2uq.callbacks._common.quantized_layers import QuantizedLayer
from lightning_n2uq.callbacks._monitor.layer_statistics import (
    BINS,
    at_floor,
    axis_range,
    count_activations,
    count_weights,
    parameters_of,
)
from lightning_n2uq.quantizers import LearnableThresholdQuantizer, Quantizer
from lightning_n2uq.report.layer_record import ActivationRecord, LayerRecord, WeightRecord
from lightning_n2uq.report.plot_data import thresholds

_CURVE_POINTS = 257


class LayerRecorder:
    """Measures layers; remembers the level of every weight in between, one byte each, on its device.

    Args:
        layers: The layers to measure.
    """

    def __init__(self, layers: Sequence[QuantizedLayer]) -> None:
        self.layers = list(layers)
        self._codes: dict[str, Tensor] = {}

    def codes(self) -> dict[str, Tensor]:
        """Returns the weights' levels at the last measurement by layer name, for a checkpoint."""
        return {name: codes.cpu() for name, codes in self._codes.items()}

    def load_codes(self, codes: dict[str, Tensor]) -> None:
        """Continues from what `codes` returned; layers that are not watched any more are left out."""
        weights = {layer.name: layer.weight for layer in self.layers if layer.weight_quantizer is not None}
        self._codes = {name: x.to(weights[name].device) for name, x in codes.items() if name in weights}

    @torch.no_grad()
    def measure(
        self, inputs: dict[str, Tensor], total: Callable[[Tensor], Tensor] | None = None
    ) -> list[LayerRecord]:
        """Returns records of all layers.

        Args:
            inputs: Samples of the layers' inputs by layer name; the record of a layer without one has no
                activation part.
            total: A function that sums a vector over ranks; None for one process.
        """
        sampled = [x for x in self.layers if x.name in inputs and x.activation_quantizer is not None]
        counts = [count_activations(x.activation_quantizer, inputs[x.name]) for x in sampled]  # type: ignore[arg-type]
        if counts and total is not None:
            counts = list(total(torch.cat(counts)).split([part.numel() for part in counts]))
        fixed = [self._fixed(layer) for layer in self.layers]
        vectors = _fetch([*counts, *fixed])
        by_name = {layer.name: vector for layer, vector in zip(sampled, vectors, strict=False)}
        return [
            _record(layer, vector, by_name.get(layer.name))
            for layer, vector in zip(self.layers, vectors[len(counts) :], strict=True)
        ]

    def _fixed(self, layer: QuantizedLayer) -> Tensor:
        """Returns what is equal on all ranks: counts of weights, the axis, the thresholds' parameters."""
        parts, device = [], next(layer.module.parameters()).device
        if layer.weight_quantizer is not None:
            before = self._codes.get(layer.name)
            before = None if before is None else before.to(device)  # loaded before the model moved
            statistics, self._codes[layer.name] = count_weights(layer, before)
            parts.append(statistics)
        quantizer = layer.activation_quantizer
        if quantizer is not None:
            axis = axis_range(quantizer, device)
            parts += [axis, parameters_of(quantizer), _curve(quantizer, axis)]
        return torch.cat([part.to(device) for part in parts])


def _curve(quantizer: Quantizer, axis: Tensor) -> Tensor:
    """Returns values on an even grid over the axis; none for learned thresholds, which say it all."""
    if isinstance(quantizer, LearnableThresholdQuantizer):
        return axis.new_zeros(0)
    grid = torch.linspace(0, 1, _CURVE_POINTS, device=axis.device) * (axis[1] - axis[0]) + axis[0]
    return quantizer(grid.float()).double()


def _fetch(vectors: Sequence[Tensor]) -> list[list[float]]:
    """Returns Python floats of 1-D tensors of one device, which are copied together."""
    if not vectors:
        return []
    flat = torch.cat(list(vectors)).cpu().split([vector.numel() for vector in vectors])
    return [part.tolist() for part in flat]


def _record(layer: QuantizedLayer, fixed: list[float], counts: list[float] | None) -> LayerRecord:
    weight = None
    if layer.weight_quantizer is not None:
        levels = layer.weight_quantizer.num_levels
        weight = _weight_record(layer, fixed[: levels + 3])
        fixed = fixed[levels + 3 :]
    if layer.activation_quantizer is None or counts is None:
        return LayerRecord(layer.name, weight, None)
    return LayerRecord(layer.name, weight, _activation_record(layer.activation_quantizer, fixed, counts))


def _weight_record(layer: QuantizedLayer, values: list[float]) -> WeightRecord:
    *usage, clipped, changed, scale = values
    count = layer.weight.numel()
    bits = layer.weight_quantizer.bits  # type: ignore[union-attr]
    changed_share = None if math.isnan(changed) else changed / count
    return WeightRecord(
        bits, count, usage, clipped / count, changed_share, None if math.isnan(scale) else scale
    )


def _activation_record(quantizer: Quantizer, fixed: list[float], counts: list[float]) -> ActivationRecord:
    usage, (below, above), histogram = counts[: -2 - BINS], counts[-2 - BINS : -BINS], counts[-BINS:]
    total = max(sum(usage), 1)
    low, high, *rest = fixed
    record = ActivationRecord(quantizer.bits, usage, below / total, above / total, low, high, histogram)
    if not isinstance(quantizer, LearnableThresholdQuantizer):
        record.curve = rest
        return record
    record.start, record.scale_in, record.scale_out, *record.widths = rest
    record.thresholds = thresholds(record.start, record.widths)
    record.widths_at_floor = at_floor(record.widths)
    return record
