"""Changes a quantizer's bit width during training and keeps what it has learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_n2uq.ops.tables import floored_widths
from lightning_n2uq.quantizers.base import check_bits
from lightning_n2uq.quantizers.n2uq import EntropyPreservingWeightQuantizer, LearnableThresholdQuantizer


def map_thresholds(start: Tensor, widths: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Returns start and widths of the quantizer with `steps` steps nearest to a given one.

    The new quantizer is to round the old one's surrogate `h`: its threshold `T'_k` lies where `h` passes
    the middle of two new levels, `h(T'_k) = (k - 1/2) * 2 / steps`. From 8 to 4 to 2 bits, where
    `2^b' - 1` divides `2^b - 1`, every such point is a threshold of the finer quantizer, and the coarser
    code is the finer one, rounded. Thresholds leave one width free; it is chosen nearest to the segments
    between the points where `h` passes the new levels. Where no positive widths give these thresholds, the
    segments themselves are taken, whose thresholds are their middles.

    Args:
        start: The start of the given quantizer, 1 element.
        widths: Its widths, `[n]`.
        steps: The number of steps wanted, 1 or more.

    Returns:
        Start `[1]` and widths `[steps]`, dtype and device of `widths`; no gradient.
    """
    width = floored_widths(widths.detach().double())
    knots = torch.cumsum(torch.cat([start.detach().double().reshape(1), width]), 0)
    levels = torch.arange(steps + 1, dtype=torch.float64, device=knots.device)
    segments = torch.diff(_inverse(knots, levels / steps))
    exact = _widths_from_thresholds(_inverse(knots, (levels[1:] - 0.5) / steps), segments)
    new_start, new_widths = (knots[:1], segments) if exact is None else exact
    return new_start.to(widths.dtype), new_widths.to(widths.dtype)


def _inverse(knots: Tensor, share: Tensor) -> Tensor:
    """Where the surrogate through `knots` `[n + 1]` has climbed the given shares `0 .. 1` of its range."""
    position = share * (knots.numel() - 1)
    lower = position.floor().clamp_max(knots.numel() - 2).long()
    return knots[lower] + (position - lower) * (knots[lower + 1] - knots[lower])


def _widths_from_thresholds(thresholds: Tensor, near: Tensor) -> tuple[Tensor, Tensor] | None:
    """Start and widths with exactly these thresholds, or None where a width would shrink below half."""
    widths = [near[0]]
    for gap in torch.diff(thresholds):
        widths.append(2 * gap - widths[-1])
    solution = torch.stack(widths)
    sign = torch.ones_like(solution)
    sign[1::2] = -1  # adding c to every other width and taking it from the rest moves no threshold
    solution = solution + sign * (sign * (near - solution)).mean()
    if bool((solution < near / 2).any()):
        return None
    return thresholds[:1] - solution[:1] / 2, solution


def change_bits(quantizer: nn.Module, bits: int) -> dict[nn.Parameter, nn.Parameter]:
    """Gives a quantizer another bit width, in place.

    Args:
        quantizer: A `LearnableThresholdQuantizer`, whose thresholds are mapped, or an
            `EntropyPreservingWeightQuantizer`, which learns nothing.
        bits: The new code width, 2 to 8.

    Returns:
        Parameters that had to be replaced, since their shape changed: old to new. Optimizers and wrappers
        that hold the old ones have to be told.

    Raises:
        ValueError: If the quantizer is of another kind or the bits are out of range.
    """
    check_bits(bits)
    if not isinstance(quantizer, (LearnableThresholdQuantizer, EntropyPreservingWeightQuantizer)):
        raise ValueError(f"quantizer: got {type(quantizer).__name__}, allowed are the quantizers 'n2uq'")
    if bits == quantizer.bits:
        return {}
    quantizer.bits, quantizer.num_levels = bits, 2**bits
    if isinstance(quantizer, EntropyPreservingWeightQuantizer):
        return {}
    old = quantizer.widths
    start, widths = map_thresholds(quantizer.start, old, quantizer.num_levels - 1)
    with torch.no_grad():
        quantizer.start.copy_(start)
    quantizer.widths = nn.Parameter(widths, requires_grad=old.requires_grad)
    return {old: quantizer.widths}
