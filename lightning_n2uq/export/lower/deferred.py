"""Per-channel operations that are not carried out yet, so that a quantizer behind them can take them over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Linear:
    """`scale * x + shift`, float64 `[C]` each."""

    scale: Float64
    shift: Float64

    def __call__(self, x: Float64) -> Float64:
        """Evaluates on `[C, k]`, a product and a sum rounded one after the other: both are monotone."""
        value: Float64 = x * self.scale[:, None] + self.shift[:, None]
        return value

    def directions(self) -> NDArray[np.int8]:
        """By channel: 1 where the value never decreases, -1 where it never increases, 0 otherwise."""
        return np.where(self.scale < 0, -1, 1).astype(np.int8)


@dataclass(frozen=True)
class Bend:
    """PReLU: `x` where positive, else `slope * x`; float64 `[C]`. A slope of zero is a ReLU."""

    slope: Float64

    def __call__(self, x: Float64) -> Float64:
        """Evaluates on `[C, k]`."""
        return np.where(x > 0, x, x * self.slope[:, None])

    def directions(self) -> NDArray[np.int8]:
        """As `Linear.directions`."""
        return np.where(self.slope < 0, 0, 1).astype(np.int8)


@dataclass(frozen=True)
class Limit:
    """`min(max(x, low), high)`."""

    low: float
    high: float

    def __call__(self, x: Float64) -> Float64:
        """Evaluates on `[C, k]`."""
        return np.clip(x, self.low, self.high)

    def directions(self) -> NDArray[np.int8]:
        """As `Linear.directions`; the same for all channels."""
        return np.ones(1, np.int8)


Stage = Linear | Bend | Limit


@dataclass(frozen=True)
class Lazy:
    """The output of a step with stages still to be applied, in order.

    Attributes:
        base: name of the step.
        channels: size of axis 1.
        bound: None where the step's output is float32; else the largest magnitude by channel `[C]` of its
            integers.
        stages: not yet applied.
    """

    base: str
    channels: int
    bound: NDArray[np.int64] | None = None
    stages: tuple[Stage, ...] = ()

    def then(self, stage: Stage) -> Lazy:
        """The value with one more stage; two linear stages become one, rounded once."""
        stages = self.stages
        if isinstance(stage, Linear) and stages and isinstance(last := stages[-1], Linear):
            stage = Linear(last.scale * stage.scale, last.shift * stage.scale + stage.shift)
            stages = stages[:-1]
        return Lazy(self.base, self.channels, self.bound, (*stages, stage))

    def linear(self, scale: Float64 | float = 1.0, shift: Float64 | float = 0.0) -> Lazy:
        """`then` with a linear stage; numbers count for all channels."""
        shape = (self.channels,)
        return self.then(
            Linear(np.array(np.broadcast_to(scale, shape), np.float64),
                   np.array(np.broadcast_to(shift, shape), np.float64))
        )  # fmt: skip

    def without_shift(self) -> tuple[Lazy, Float64]:
        """Takes a trailing shift off: the value without it, and the shift `[C]`."""
        if not self.stages or not isinstance(last := self.stages[-1], Linear):
            return self, np.zeros(self.channels)
        rest = Lazy(self.base, self.channels, self.bound, self.stages[:-1])
        if np.all(last.scale == 1):
            return rest, last.shift
        return rest.linear(last.scale), last.shift


def evaluate(stages: tuple[Stage, ...], x: Float64) -> Float64:
    """Applies the stages in float64 to `[C, k]`."""
    for stage in stages:
        x = stage(x)
    return x


def directions(stages: tuple[Stage, ...], channels: int) -> NDArray[np.int8]:
    """By channel `[C]`: 1 where the composed map increases, -1 where it decreases, 0 where it is neither."""
    product = np.ones(channels, np.int8)
    for stage in stages:
        product = product * stage.directions()
    return product
