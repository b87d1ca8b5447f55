"""Where values lie between a quantizer's levels: the continuous number of which the code is the rounding."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor, nn

from lightning_n2uq.ops.level_table import level_place
from lightning_n2uq.ops.staircase import staircase_position
from lightning_n2uq.ops.tables import compute_dtype
from lightning_n2uq.quantizers.apot import APoT
from lightning_n2uq.quantizers.binary import BinaryWeight
from lightning_n2uq.quantizers.dorefa import DoReFa, DoReFaWeight
from lightning_n2uq.quantizers.ewgs import EWGS
from lightning_n2uq.quantizers.grid import UniformGrid
from lightning_n2uq.quantizers.integer_levels import nonzero
from lightning_n2uq.quantizers.lcq import LCQ
from lightning_n2uq.quantizers.least_error import LeastErrorWeight
from lightning_n2uq.quantizers.looks import looking
from lightning_n2uq.quantizers.lsq import LSQ
from lightning_n2uq.quantizers.n2uq import EntropyPreservingWeightQuantizer, LearnableThresholdQuantizer
from lightning_n2uq.quantizers.nulsq import NuLSQ
from lightning_n2uq.quantizers.pact import PACT
from lightning_n2uq.quantizers.seq import SEQ
from lightning_n2uq.quantizers.statsq import StatsQ
from lightning_n2uq.quantizers.ternary import TernaryWeight
from lightning_n2uq.quantizers.turned import TurnedWeight


@singledispatch
def level_position(quantizer: nn.Module, x: Tensor) -> Tensor:
    """Returns every value's position between the levels, `0 .. num_levels - 1`, clipped; differentiable.

    Its nearest integer is `quantizer.codes(x)` (at a tie, either neighbour); an end of the range is reached
    exactly by values that the quantizer clips. The gradient is the true one, with no straight-through rule,
    and it reaches the quantizer's parameters and the scale that is computed from the values.

    Args:
        quantizer: A quantizer of `lightning_n2uq.quantizers`.
        x: The values, of any shape (weights: `[C, ...]`), floating.

    Returns:
        Shape of `x`, float32 (float64 for float64).

    Raises:
        ValueError: If positions are not defined for this kind of quantizer.
    """
    raise ValueError(f"quantizer: got {type(quantizer).__name__}, which has no positions between levels")


@level_position.register
def _(quantizer: LearnableThresholdQuantizer, x: Tensor) -> Tensor:
    return staircase_position(x, quantizer.start, quantizer.widths, quantizer.scale_in)


@level_position.register
def _(quantizer: EntropyPreservingWeightQuantizer, x: Tensor) -> Tensor:
    x = x.to(compute_dtype(x.dtype))
    dims = tuple(range(1, x.dim()))
    n = quantizer.num_levels - 1
    if quantizer.rescale:
        scale = x.abs().mean(dim=dims, keepdim=True) * (n / 2 ** (quantizer.bits - 1))
    else:
        scale = x.abs().amax(dim=dims, keepdim=True)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ((x / scale).clamp(-1, 1) + 1) * (n / 2)


@level_position.register
def _(quantizer: LSQ, x: Tensor) -> Tensor:
    (step,) = quantizer.asked(x, "step")
    offset = getattr(quantizer, "offset", None)
    x = x.to(step.dtype) if offset is None else x.to(step.dtype) - offset
    return (x / step).clamp(quantizer.low, quantizer.high) - quantizer.low


@level_position.register
def _(quantizer: UniformGrid, x: Tensor) -> Tensor:
    with looking():
        step = quantizer.current_step(x)
    return (x / step).clamp(quantizer.low, quantizer.high) - quantizer.low


@level_position.register
def _(quantizer: PACT, x: Tensor) -> Tensor:
    return (x.to(quantizer.clip.dtype) / quantizer.bounded("clip")).clamp(0, 1) * (quantizer.num_levels - 1)


@level_position.register
def _(quantizer: DoReFa, x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype)).clamp(0, 1) * (quantizer.num_levels - 1)


@level_position.register
def _(quantizer: DoReFaWeight, x: Tensor) -> Tensor:
    return quantizer._unit(x)[0] * (quantizer.num_levels - 1)


@level_position.register
def _(quantizer: APoT, x: Tensor) -> Tensor:
    unit, levels = quantizer._unit(x), quantizer.levels
    lower = torch.bucketize(unit.detach(), levels[1:-1])
    return lower + (unit - levels[lower]) / (levels[lower + 1] - levels[lower])


@level_position.register
def _(quantizer: NuLSQ, x: Tensor) -> Tensor:
    levels = quantizer.levels(x)
    lower, share = level_place(x.to(levels.dtype), levels)
    return lower + share


@level_position.register
def _(quantizer: LCQ, x: Tensor) -> Tensor:
    return quantizer.position(x)


@level_position.register
def _(quantizer: EWGS, x: Tensor) -> Tensor:
    with looking():
        return quantizer.place(x) * (quantizer.num_levels - 1)


@level_position.register
def _(quantizer: StatsQ, x: Tensor) -> Tensor:
    x = x.to(compute_dtype(x.dtype))
    half = quantizer.num_levels // 2
    scale = nonzero(2 * x.abs().mean(dim=tuple(range(1, x.dim())), keepdim=True))
    return (x / scale * half - 0.5).clamp(-half, half - 1) + half


@level_position.register
def _(quantizer: SEQ, x: Tensor) -> Tensor:
    with looking():
        return quantizer.place(x.to(compute_dtype(x.dtype))).clamp(0, quantizer.num_levels - 1)


@level_position.register
def _(quantizer: LeastErrorWeight, x: Tensor) -> Tensor:
    return quantizer.place(x.to(compute_dtype(x.dtype))).clamp(0, quantizer.num_levels - 1)


@level_position.register
def _(quantizer: TernaryWeight, x: Tensor) -> Tensor:
    return quantizer.place(x.to(compute_dtype(x.dtype)))


@level_position.register
def _(quantizer: BinaryWeight, x: Tensor) -> Tensor:
    x = x.to(compute_dtype(x.dtype))
    scale = nonzero(x.abs().mean(dim=tuple(range(1, x.dim())), keepdim=True))
    return ((x / scale).clamp(-1, 1) + 1) / 2


@level_position.register
def _(quantizer: TurnedWeight, x: Tensor) -> Tensor:
    return level_position(quantizer.inner, quantizer.channels_first(x))
