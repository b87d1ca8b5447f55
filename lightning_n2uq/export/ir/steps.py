"""The operations of a deployed network: what every engine computes, in which order and in which dtype.

A step reads the outputs of earlier steps by name and has one output, called by the step's own name. Images
are `[N, C, H, W]`, features `[N, C]`; per-channel arrays belong to axis 1. Real values are float32 and every
step that works on them is a fixed sequence of single IEEE operations (no fused multiply-add), so that engines
agree in every bit. Sums, where the order of additions could matter, only ever run over integers that the
accumulator holds exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

EXACT_FLOAT32 = 2**24
"""Integers up to here, and sums of them, are exact in float32."""
TINY = 2.0**-100
"""Lower limit of a sample's largest magnitude: an all-zero sample must not be divided by zero."""

STEPS: dict[str, type[Step]] = {}
"""Kinds of steps by `op`; a subclass that names its own enters itself."""


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        op: Kind of the step, as files name it.
        name: Name of the step and of its output, unique in a network.
        inputs: Names of the steps that it reads.
    """

    op: ClassVar[str] = ""
    name: str
    inputs: tuple[str, ...]

    def __init_subclass__(cls, op: str = "") -> None:
        if op:
            cls.op = op
            STEPS[op] = cls

    def arrays(self) -> dict[str, Array]:
        """Returns the numpy fields by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}

    def settings(self) -> dict[str, object]:
        """Returns the remaining fields by name: strings, numbers, tuples, None."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.arrays()}


@dataclass(frozen=True)
class Window:
    """How a kernel moves: strides, padding (top, left, bottom, right), dilations, groups of channels."""

    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def span(self, kernel: tuple[int, ...]) -> tuple[int, int]:
        """Returns the height and width that a dilated kernel covers."""
        height, width = (d * (k - 1) + 1 for d, k in zip(self.dilation, kernel, strict=True))
        return height, width

    def output_size(self, size: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, int]:
        """Returns the height and width of the output for an image of height and width `size`."""
        top, left, bottom, right = self.pads
        padded = (size[0] + top + bottom, size[1] + left + right)
        places = zip(padded, self.span(kernel), self.stride, strict=True)
        height, width = ((whole - span) // stride + 1 for whole, span, stride in places)
        return height, width


@dataclass(frozen=True)
class Input(Step, op="input"):
    """The images: float32, or uint8 where the network begins with `Normalize`. `shape` is `(C, H, W)`."""

    shape: tuple[int, ...] = ()
    dtype: str = "float32"


@dataclass(frozen=True)
class Normalize(Step, op="normalize"):
    """`(float32(pixel) - offset) / divisor` per channel, both float32 `[C]`."""

    offset: Array
    divisor: Array


@dataclass(frozen=True)
class Codes(Step, op="codes"):
    """`q = #{k : sign * x > thresholds_k}`, uint8.

    `thresholds` is `[1, n]` or `[C, n]`, non-decreasing along `k`; int32 where `x` is an accumulator, else
    float32. `sign` is `[C]` of -1 and 1 in the same dtype (a decreasing map in front), or None.
    """

    thresholds: Array
    sign: Array | None = None

    @property
    def levels(self) -> int:
        """Largest code."""
        return int(self.thresholds.shape[1])


@dataclass(frozen=True)
class UniformCodes(Step, op="uniform_codes"):
    """`q = clip(round_half_even((x - offset) / step), 0, levels)`, uint8: the baselines' quantizer."""

    step: float = 1.0
    levels: int = 3
    offset: float = 0.0


@dataclass(frozen=True)
class IntConv(Step, op="int_conv"):
    """Convolution of uint8 codes with integer weights `[O, I / groups, kh, kw]` (int16) into int32.

    `bits` is the weights' code width and `odd` tells levels `2 q - (2^bits - 1)` from `q - 2^(bits - 1)`;
    `levels` is the largest code of the input.
    """

    weight: Array
    bits: int = 2
    odd: bool = True
    levels: int = 3
    window: Window = Window()

    def bound(self) -> NDArray[np.int64]:
        """Returns the largest magnitude of every output channel's sum, and of all its partial sums."""
        weight = np.abs(self.weight).reshape(len(self.weight), -1)
        bound: NDArray[np.int64] = weight.sum(1, dtype=np.int64) * self.levels
        return bound

    @property
    def needs_float64(self) -> bool:
        """Whether some partial sum can pass 2^24, so that float32 would round it."""
        return bool(self.bound().max(initial=0) > EXACT_FLOAT32)


class IntLinear(IntConv, op="int_linear"):
    """`IntConv` for features: weights `[O, I]`, input `[N, I]`."""


@dataclass(frozen=True)
class BorderSums(Step, op="border_sums"):
    """Sums of the weights that fall inside an image of height and width `size`, `[1, O, H', W']` float32.

    Needed where codes carry an offset: the zeros around an image have none. `weight` is `[O, 1, kh, kw]`
    float32 integers, already summed over the input channels; nothing is read.
    """

    weight: Array
    size: tuple[int, int] = (1, 1)
    window: Window = Window()


@dataclass(frozen=True)
class FixedLinear(Step, op="fixed_linear"):
    """A full-precision layer without kernel window, as exact sums: `[N, I]`, or `[N, I, H, W]` with stride.

    `s = max(max|x|, TINY) * 2^-bits` over each sample, `x_int = round_half_even(x / s)`, then
    `float32(sum w_int x_int) * s`. `weight` is `[O, I]` int32; every sum stays below 2^53.
    """

    weight: Array
    bits: int = 24
    stride: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class SplitConv(Step, op="split_conv"):
    """A full-precision convolution as three exact float32 ones.

    `s = max(max|x|, TINY) * 2^-high_bits` over each sample, `u = x / s`, `h = round(u)`,
    `l = round((u - h) * 2^low_bits) * 2^-low_bits`; then
    `conv(h, high) * s + (conv(h, low) * s + conv(l, high) * s)`. `high` holds integers, `low` multiples of a
    power of two below one, both float32 `[O, I / groups, kh, kw]`; every sum has at most 24 significant bits.
    """

    high: Array
    low: Array
    high_bits: int = 8
    low_bits: int = 8
    window: Window = Window()


@dataclass(frozen=True)
class MeanPool(Step, op="mean_pool"):
    """Mean over height and width, `[N, C, H, W]` to `[N, C, 1, 1]`: `float32(sum x_int / (H W)) * s`.

    `s` and `x_int` are those of `FixedLinear`; the sum and the quotient are float64.
    """

    bits: int = 24


@dataclass(frozen=True)
class ChannelStep(Step):
    """An operation that works channel by channel, which thresholds behind it can take over.

    A placed one holds float32 arrays. While it waits in front of a quantizer (`lower/deferred.py`) it is
    nameless and its arrays are float64.
    """

    def evaluate(self, x: Array) -> Array:
        """Returns the output for `x`, whose axis 1 holds the channels, in the dtype of `x`."""
        raise NotImplementedError

    def directions(self) -> NDArray[np.int8]:
        """Returns 1 where a channel never decreases, -1 where it never increases, else 0; `[C]` or `[1]`."""
        return np.ones(1, np.int8)


def channelwise(array: Any, x: Any) -> Any:  # noqa: ANN401 -- arrays or tensors
    """Returns per-channel values `[C]`, shaped to go with `x`, whose axis 1 they belong to."""
    return array.reshape(1, -1, *(1,) * (x.ndim - 2))


@dataclass(frozen=True)
class Affine(ChannelStep, op="affine"):
    """`x * scale + shift` per channel; either may be None. Accumulators become float32. Two roundings."""

    scale: Array | None = None
    shift: Array | None = None

    def evaluate(self, x: Array) -> Array:
        """Rounds the product and the sum one after the other: both are monotone."""
        if self.scale is not None:
            x = x * channelwise(self.scale, x)
        return x if self.shift is None else x + channelwise(self.shift, x)

    def directions(self) -> NDArray[np.int8]:
        """Returns the signs of the scale."""
        return super().directions() if self.scale is None else np.where(self.scale < 0, -1, 1).astype(np.int8)


@dataclass(frozen=True)
class PReLU(ChannelStep, op="prelu"):
    """`x` where `x > 0`, else `slope * x`; `[C]`. A slope of zero is a ReLU."""

    slope: Array

    def evaluate(self, x: Array) -> Array:
        """Multiplies everywhere and chooses."""
        return np.where(x > 0, x, x * channelwise(self.slope, x))

    def directions(self) -> NDArray[np.int8]:
        """Returns 0 where the slope is negative."""
        return np.where(self.slope < 0, 0, 1).astype(np.int8)


@dataclass(frozen=True)
class Clamp(ChannelStep, op="clamp"):
    """`min(max(x, low), high)`; an infinite bound is none."""

    low: float = 0.0
    high: float = float("inf")

    def evaluate(self, x: Array) -> Array:
        """Rounds the bounds to the dtype of `x`; NaN stays NaN."""
        clamped: Array = np.minimum(np.maximum(x, x.dtype.type(self.low)), x.dtype.type(self.high))
        return clamped


class Add(Step, op="add"):
    """Sum of two tensors of one shape."""


class Mul(Step, op="mul"):
    """Product of two tensors, one of which may be `[N, C, 1, 1]`."""


@dataclass(frozen=True)
class MaxPool(Step, op="max_pool"):
    """Largest value under a `kernel`; the surroundings count as minus infinity."""

    kernel: tuple[int, int] = (2, 2)
    window: Window = Window()


class Concat(Step, op="concat"):
    """Channels of several tensors, one after the other."""


class Flatten(Step, op="flatten"):
    """`[N, C, H, W]` to `[N, C H W]`."""
