"""Measure quantized layers on their device: counts as one vector, summed over ranks, fetched once."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_n2uq.callbacks._common.quantized_layers import QuantizedLayer
from lightning_n2uq.ops.tables import WIDTH_FLOOR, floored_widths
from lightning_n2uq.quantizers import EntropyPreservingWeightQuantizer, LearnableThresholdQuantizer, Quantizer
from lightning_n2uq.quantizers.positions import level_position

BINS = 64
"""Bins of the input histogram."""

_MARGIN = 0.25  # of the quantizer's range, shown left and right of it
_FAR = 1e4  # an input that saturates every quantizer


def count_levels(position: Tensor, num_levels: int) -> Tensor:
    """Returns uses of each level `[num_levels]` float64; a bincount would wait for the GPU."""
    index = position.nan_to_num().round().clamp(0, num_levels - 1).long().flatten()
    ones = torch.ones((), dtype=torch.float64, device=index.device).expand(index.numel())
    return torch.zeros(num_levels, dtype=torch.float64, device=index.device).scatter_add_(0, index, ones)


def axis_range(quantizer: Quantizer, device: torch.device) -> Tensor:
    """Returns `[low, high]` of the histogram's axis, float64: the quantizer's range and a margin.

    For learned thresholds the axis is the scaled input `alpha x`, for others the input itself.
    """
    if isinstance(quantizer, LearnableThresholdQuantizer):
        start = quantizer.start.detach().reshape(())
        ends = torch.stack([start, start + floored_widths(quantizer.widths.detach()).sum()])
    else:
        ends = quantizer(torch.tensor([-_FAR, _FAR], device=device))
    margin = _MARGIN * (ends[1] - ends[0])
    return torch.stack([ends[0] - margin, ends[1] + margin]).detach().double()


def count_activations(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Returns counts over a sample `x` of a layer's inputs, `[levels + 2 + BINS]` float64 on its device.

    They are the uses of each level; the values at or below the lower end of the range, and at or above its
    upper end; the values in each bin of the histogram's axis, those beyond its ends included.
    """
    position = level_position(quantizer, x)
    top = quantizer.num_levels - 1
    clipped = torch.stack([(position <= 0).sum(), (position >= top).sum()]).double()
    scaled = x * quantizer.scale_in.detach() if isinstance(quantizer, LearnableThresholdQuantizer) else x
    low, high = axis_range(quantizer, x.device)
    share = (scaled.double() - low) / (high - low)
    histogram = count_levels(share.clamp(0, 1) * BINS - 0.5, BINS)
    return torch.cat([count_levels(position, quantizer.num_levels), clipped, histogram])


def count_weights(layer: QuantizedLayer, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns counts over a layer's weights, and their level indices.

    Args:
        layer: A layer with a weight quantizer.
        before: The level indices of an earlier call, or None.

    Returns:
        `[levels + 3]` float64: uses of each level, number of clipped weights, number that changed level
        since (NaN without `before`), mean scale `S` (NaN where the method has none); and uint8 indices.
    """
    quantizer, weight = layer.weight_quantizer, layer.weight.detach()
    if quantizer is None:
        raise ValueError(f"layer: {layer.name} has no weight quantizer")
    position = level_position(quantizer, weight)
    codes = position.nan_to_num().round().to(torch.uint8)
    clipped = ((position <= 0) | (position >= quantizer.num_levels - 1)).sum()
    missing = torch.full((), float("nan"), dtype=torch.float64, device=weight.device)
    changed = missing if before is None else (codes != before).sum()
    scale = missing
    if isinstance(quantizer, EntropyPreservingWeightQuantizer):
        scale = quantizer.scale(weight).mean() * (quantizer.num_levels - 1)
    rest = torch.stack([clipped.double(), changed.double(), scale.double()])
    return torch.cat([count_levels(position, quantizer.num_levels), rest]), codes


def parameters_of(quantizer: Quantizer | None) -> Tensor:
    """Returns `start`, `scale_in`, `scale_out` and all widths of learned thresholds, 1-D float64."""
    if not isinstance(quantizer, LearnableThresholdQuantizer):
        return torch.zeros(0, dtype=torch.float64)
    parts = (quantizer.start, quantizer.scale_in, quantizer.scale_out, quantizer.widths)
    return torch.cat([part.detach().reshape(-1) for part in parts]).double()


def at_floor(widths: list[float]) -> int:
    """Returns the number of widths that no gradient can move any more."""
    return sum(width <= WIDTH_FLOOR for width in widths)
