"""Per-channel operations that are not carried out yet, so that a quantizer behind them can take them over."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lightning_n2uq.export.ir.steps import Affine, ChannelStep, Clamp, PReLU

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Deferred:
    """The output of a step with per-channel operations still to be applied, in order.

    Attributes:
        base: Name of the step.
        channels: Size of axis 1.
        bound: None where the step's output is float32; else the largest magnitude by channel `[C]` of its
            integers.
        pending: Operations not yet applied: nameless steps with float64 arrays.
    """

    base: str
    channels: int
    bound: NDArray[np.int64] | None = None
    pending: tuple[ChannelStep, ...] = ()

    def affine(self, scale: Float64 | float = 1.0, shift: Float64 | float = 0.0) -> Deferred:
        """Appends `scale * x + shift`; numbers count for all channels. Two in a row become one."""
        shape, pending = (self.channels,), self.pending
        scale, shift = (np.array(np.broadcast_to(v, shape), np.float64) for v in (scale, shift))
        if pending and isinstance(last := pending[-1], Affine):
            before_scale, before_shift = scale_and_shift(last)
            scale, shift, pending = before_scale * scale, before_shift * scale + shift, pending[:-1]
        return replace(self, pending=(*pending, Affine("", (), scale, shift)))

    def prelu(self, slope: Float64 | float) -> Deferred:
        """Appends a PReLU; a number counts for all channels."""
        array = np.array(np.broadcast_to(slope, (self.channels,)), np.float64)
        return replace(self, pending=(*self.pending, PReLU("", (), array)))

    def clamp(self, low: float, high: float) -> Deferred:
        """Appends `min(max(x, low), high)`."""
        return replace(self, pending=(*self.pending, Clamp("", (), low, high)))

    def ends_affine(self) -> bool:
        """Whether the last pending operation is affine."""
        return bool(self.pending) and isinstance(self.pending[-1], Affine)

    def without_shift(self) -> tuple[Deferred, Float64]:
        """Takes a trailing shift off: returns the value without it, and the shift `[C]`."""
        if not self.pending or not isinstance(last := self.pending[-1], Affine):
            return self, np.zeros(self.channels)
        rest = replace(self, pending=self.pending[:-1])
        scale, shift = scale_and_shift(last)
        return rest if (scale == 1).all() else rest.affine(scale), shift


def scale_and_shift(step: Affine) -> tuple[Float64, Float64]:
    """Returns both arrays of a pending step, which always has them."""
    assert step.scale is not None
    assert step.shift is not None
    return step.scale, step.shift


def evaluate(steps: tuple[ChannelStep, ...], x: Float64) -> Float64:
    """Applies the steps in float64 to `[C, k]`."""
    x = x[None]
    for step in steps:
        x = step.evaluate(x)
    return x[0]


def invert(steps: tuple[ChannelStep, ...], y: Float64) -> Float64:
    """Returns about where the steps reach `y` `[C, k]`: a first guess, infinite or NaN for nowhere."""
    with np.errstate(all="ignore"):
        for step in reversed(steps):
            if isinstance(step, Affine):
                scale, shift = scale_and_shift(step)
                y = (y - shift[:, None]) / scale[:, None]
            elif isinstance(step, PReLU):
                y = np.where(y > 0, y, y / step.slope[:, None])
            elif isinstance(step, Clamp):
                y = np.where(y < step.low, -np.inf, np.where(y < step.high, y, np.inf))
    return y


def directions(steps: tuple[ChannelStep, ...], channels: int) -> NDArray[np.int8]:
    """Returns by channel `[C]`: 1 where the composed map increases, -1 where it decreases, 0 for neither."""
    product = np.ones(channels, np.int8)
    for step in steps:
        product = product * step.directions()
    return product
