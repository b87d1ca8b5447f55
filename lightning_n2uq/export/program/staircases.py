"""An activation quantizer as the staircase that it computes: found by asking it, whatever its method."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_n2uq.export.ir.thresholds import last_failing_float

Float32 = NDArray[np.float32]

_EVEN = 4 * 2.0**-23
"""How far, relative to the largest magnitude, levels may lie from an even spacing: a few roundings."""


@dataclass(frozen=True)
class Staircase:
    """`levels[#{k : x > thresholds_k}]`, of all finite float32 `x` the values of the quantizer itself.

    Attributes:
        thresholds: Where the code rises, `[n]`, non-decreasing.
        levels: The output of each code, `[n + 1]`.
        step: Distance of two levels, 0 where they are not evenly spaced.
        offset: Output of code 0.
    """

    thresholds: Float32
    levels: Float32
    step: float
    offset: float

    @property
    def uniform(self) -> bool:
        """Whether levels are evenly spaced, so that sums over codes are sums over levels."""
        return self.step > 0


@torch.no_grad()
def staircase(quantizer: nn.Module, name: str) -> Staircase:
    """Finds where a trained activation quantizer's code changes, and what it gives for each code.

    Args:
        quantizer: Anything with `codes` and `num_levels` whose code never falls as the input grows, one
            staircase for all channels; in evaluation mode.
        name: What a message calls it.

    Raises:
        ValueError: It was never given data, or its code falls somewhere, or a level is not finite.
    """
    initialized = getattr(quantizer, "initialized", None)
    if initialized is not None and not bool(initialized):
        raise ValueError(f"{name}: its range was never fitted; calibrate or train the network first")
    count = int(quantizer.num_levels) - 1  # type: ignore[arg-type]

    def codes(x: Float32) -> NDArray[np.int64]:
        asked = torch.from_numpy(np.ascontiguousarray(x)).to(_device(quantizer))
        found: Tensor = quantizer.codes(asked)  # type: ignore[operator]
        return found.cpu().numpy().astype(np.int64)

    wanted = np.arange(1, count + 1)[None]
    thresholds = last_failing_float(lambda x: codes(x) >= wanted, (1, count))[0]
    with np.errstate(over="ignore"):  # behind the largest number comes infinity
        behind = np.nextafter(thresholds, np.float32(np.inf))
    inside = np.concatenate([thresholds[:1], behind])
    inside = np.clip(inside, np.finfo(np.float32).min, np.finfo(np.float32).max)
    reached = codes(inside)
    ends = codes(np.array([np.finfo(np.float32).min, np.finfo(np.float32).max], np.float32))
    if (np.diff(thresholds) < 0).any() or (np.diff([ends[0], *reached, ends[1]]) < 0).any():
        raise ValueError(f"{name}: its code falls as the input grows, allowed is one that never does")
    values = quantizer(torch.from_numpy(inside).to(_device(quantizer))).float().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: a level is not finite; nothing can be exported from this network")
    return _with_spacing(thresholds, _levels(values, reached, count))


def _levels(values: Float32, reached: NDArray[np.int64], count: int) -> Float32:
    """Returns the output of every code; one that no input reaches gets the output of the code below."""
    levels = np.full(count + 1, np.float32(np.nan))
    levels[reached] = values
    known = np.maximum.accumulate(np.where(np.isnan(levels), 0, np.arange(count + 1)))
    levels[0] = values[0] if np.isnan(levels[0]) else levels[0]
    return levels[known]


def _with_spacing(thresholds: Float32, levels: Float32) -> Staircase:
    places = np.arange(levels.size, dtype=np.float64)
    used = np.concatenate([[True], np.diff(levels) > 0])  # codes that inputs reach
    step = offset = 0.0
    if used.sum() > 1:
        slope, start = np.polyfit(places[used], levels[used].astype(np.float64), 1)
        even = np.abs(start + slope * places[used] - levels[used]).max()
        if slope > 0 and even <= _EVEN * np.abs(levels).max():
            step, offset = float(slope), float(start)
    if step and abs(offset) <= _EVEN * np.abs(levels).max():
        offset = 0.0  # levels from 0 up: a rounding of the fit
    return Staircase(thresholds, levels, step, offset)


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in (*module.parameters(), *module.buffers())), torch.device("cpu"))
