"""Uniform quantizers as tables of thresholds, so that the kernels of the fused chain run them, too.

`round(x / step)` climbs at one float32 number per level: the smallest whose quotient rounds up. Found by
evaluating the quantizer's own arithmetic, these numbers make a staircase with the plain layer's very codes.
Its surrogate has slope 1 inside the clipping range and 0 outside; at the range's ends, torch's clamp decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.ops.tables import QuantizerParameters, ThresholdTables

THRESHOLDS = "n2uq"
METHODS = ("lsq", "lsq_plus", "pact", "pact_published", "dorefa")

Array: TypeAlias = Any  # of numpy
Number: TypeAlias = Any  # of numpy, float32
Function: TypeAlias = Callable[[Any], Any]
_KEPT = 512  # layers' tables
_MAGNITUDE = 2**31 - 1
_NEAR = np.arange(-2, 3)[:, None]  # where rounding usually ends up
_LARGEST = 0x7F7FFFFF  # bits of the largest finite number


class UniformParameters(NamedTuple):
    """A uniform activation quantizer: `step * q + offset`, `q = 0 .. 2^bits - 1`.

    Attributes:
        method: One of `METHODS`.
        bits: The code width.
        size: LSQ's step or PACT's clip, 1 element; None for DoReFa, whose range is fixed.
        offset: LSQ+'s offset, 1 element; None for the others.
    """

    method: str
    bits: int
    size: Tensor | None = None
    offset: Tensor | None = None

    @property
    def scale_out(self) -> Tensor:
        """One: slopes and levels are what they are."""
        return torch.ones(1)

    def slots(self) -> tuple[Tensor | None, ...]:
        """Returns the parameters in the places of a `QuantizerParameters`."""
        return self.offset, None, None, self.size

    def tables(self, dtype: torch.dtype) -> ThresholdTables:
        """Returns the tables in float32, the one dtype of the fused chain; kept: nobody may write to them."""
        return _tables(self.method, self.bits, _number(self.size), _number(self.offset))

    def step(self) -> float:
        """Returns the distance of neighbouring levels, as the plain layer rounds it to float32."""
        return float(_step(self.method, 2**self.bits - 1, np.float32(_number(self.size))))

    def gradients(self, sums: Tensor, value_sum: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the parameters' gradients in the places of `slots`; see each method's class.

        Args:
            sums: Sums of `g` and of `g x` per segment; the first and the last are the clipped ends.
            value_sum: The sum of `g q`.
        """
        n, value = 2**self.bits - 1, value_sum.item()
        (below, _), *_, (above, _) = sums.tolist()
        inside, inside_x = sums[1:-1].sum(0).tolist()
        visible = value - value  # NaN anywhere reaches every parameter
        size = offset = None
        if self.method in ("lsq", "lsq_plus") and self.size is not None:
            moved = inside_x - _number(self.offset) * inside
            size = torch.full_like(self.size, value - moved / _number(self.size))
        elif self.size is not None:
            share = value / n if self.method == "pact_published" else 0.0
            size = torch.full_like(self.size, above + share + visible)
        if self.offset is not None:
            offset = torch.full_like(self.offset, below + above + visible)
        return offset, None, None, size


def quantizer_parameters(
    method: str, bits: int, given: Sequence[Tensor]
) -> QuantizerParameters | UniformParameters:
    """Returns a quantizer from the tensors that an operator was given, without None.

    Args:
        method: `THRESHOLDS` or one of `METHODS`.
        bits: The code width of a uniform quantizer.
        given: The parameters in the order of a `QuantizerParameters`.
    """
    if method == THRESHOLDS:
        return QuantizerParameters(*given)
    offset = given[0] if len(given) > 1 else None
    return UniformParameters(method, bits, given[-1] if given else None, offset)


def _number(x: Tensor | None) -> float:
    return 0.0 if x is None else x.item()


def _step(method: str, n: int, size: Number) -> Number:
    if method in ("lsq", "lsq_plus"):
        return size
    return size / np.float32(n) if method != "dorefa" else np.float32(1) / np.float32(n)


@lru_cache(maxsize=_KEPT)
@np.errstate(all="ignore")
def _tables(method: str, bits: int, size: float, offset: float) -> ThresholdTables:
    n = 2**bits - 1
    shift, step = np.float32(offset), _step(method, n, np.float32(size))
    codes, inside, above = _arithmetic(method, n, np.float32(size), shift, step)
    wanted = np.arange(1, n + 1, dtype=np.float32)
    guess = (wanted.astype(np.float64) - 0.5) * float(step) + offset
    thresholds = _below(_first(lambda x: codes(x) >= wanted, guess))
    ends = np.array([offset, offset + n * float(step)])
    knots = np.empty(n + 1, np.float32)
    knots[[0, -1]] = _below(_first(lambda x: np.where([True, False], inside(x), above(x)), ends))
    knots[1:-1] = thresholds[:-1] / 2 + thresholds[1:] / 2
    slopes = np.ones(n + 2, np.float32)
    slopes[[0, -1]] = 0.0
    levels, unused = np.arange(n + 1, dtype=np.float32), np.zeros(n, np.float32)
    outputs = levels / np.float32(n) if method == "dorefa" else levels * step + shift
    fields = np.float32(1), knots, thresholds, slopes, unused, unused, levels, outputs
    return ThresholdTables(*(torch.from_numpy(np.array(field, np.float32)) for field in fields))


def _arithmetic(method: str, n: int, size: Number, offset: Number, step: Number) -> tuple[Function, ...]:
    """Returns a method's code, and whether an input has passed the lower and the upper end of its range.

    Each in float32, operation by operation, as in the method's class.
    """
    zero, one, top = np.float32(0), np.float32(1), np.float32(n)
    within, beyond = (np.greater_equal, np.greater) if _ends_are_inside() else (np.greater, np.greater_equal)
    if method == "dorefa":
        return (
            lambda x: np.rint(np.clip(x, zero, one) * top),
            lambda x: within(x, 0),
            lambda x: beyond(x, one),
        )
    if method in ("pact", "pact_published"):
        clipped: Function = lambda x: np.where(x >= size, size, np.maximum(x, zero))  # noqa: E731
        return lambda x: np.rint(clipped(x) / step), lambda x: within(x, 0), lambda x: x >= size
    place: Function = lambda x: (x - offset) / step  # noqa: E731
    return (
        lambda x: np.rint(np.clip(place(x), zero, top)),
        lambda x: within(place(x), 0),
        lambda x: beyond(place(x), top),
    )


@cache
def _ends_are_inside() -> bool:
    """Returns whether torch's clamp lets the gradient of a value at an end pass: releases differ.

    Asked in a thread of its own: inside an operator torch records no gradients.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_gradient_at_an_end).result() > 0


def _gradient_at_an_end() -> float:
    end = torch.zeros(1, requires_grad=True)
    (grad,) = torch.autograd.grad(end.clamp(0, 1).sum(), end)
    return grad.item()


def _first(reached: Function, guess: Array) -> Array:
    """Returns the smallest numbers where a condition that holds from some number on holds.

    Args:
        reached: Whether float32 numbers `[..., number of guesses]` meet their conditions.
        guess: Numbers close by.
    """
    middle = _order(guess.astype(np.float32))
    near = middle + _NEAR
    found = reached(_value(near))
    if not found[0].any() and found[-1].all():
        return _value(middle + found.argmax(0) + _NEAR[0])
    low, high, width = middle - 1, middle + 1, 1
    for _ in range(32):
        late, early = reached(_value(low)), ~reached(_value(high))
        if not (late | early).any():
            break
        low, high, width = np.where(late, low - width, low), np.where(early, high + width, high), 2 * width
    while (high - low > 1).any():
        middle = (low + high) // 2
        found = reached(_value(middle))
        low, high = np.where(found, low, middle), np.where(found, middle, high)
    return _value(high)


def _below(x: Array) -> Array:
    """Returns the next smaller numbers."""
    return _value(_order(x) - 1)


def _order(x: Array) -> Array:
    """Returns integers in the order of float32 numbers, without gaps; both zeros are 0."""
    bits = x.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & _MAGNITUDE), bits)


def _value(order: Array) -> Array:
    """Undoes `_order`; integers beyond the largest number stand for it."""
    bits = np.minimum(np.abs(order), _LARGEST)
    return np.where(order < 0, bits - 2**31, bits).astype(np.int32).view(np.float32)
