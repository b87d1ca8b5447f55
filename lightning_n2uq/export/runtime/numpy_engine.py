"""The network in plain numpy: what the hardware computes, step by step.

Integer layers run in int32 from end to end. Nothing here is fast; it is the statement that other engines are
compared with, and it needs neither torch nor a runtime.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.integer_steps import GridCodes, IntAdd, IntMaxPool, SumPool, count_passed
from lightning_n2uq.export.ir.steps import channelwise

Tensor = Any
"""A numpy array of any dtype."""


def run_numpy(description: Description, images: Tensor) -> dict[str, Tensor]:
    """Returns the outputs of all steps by name, for images `[N, C, H, W]`.

    Raises:
        ValueError: The images do not fit the network.
    """
    description.check_input(str(images.dtype), images.shape)
    values: dict[str, Tensor] = {description.input.name: images}
    for step in description.steps[1:]:
        values[step.name] = run_step(step, *(values[name] for name in step.inputs))
    return values


def _windows(x: Tensor, kernel: tuple[int, ...], window: s.Window, fill: float = 0) -> Tensor:
    """`[N, C, H', W', kh, kw]`: what the kernel sees at every place, surrounded by `fill`."""
    top, left, bottom, right = window.pads
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    (dh, dw), (sh, sw) = window.dilation, window.stride
    view: Tensor = sliding_window_view(x, window.span(kernel), (2, 3))
    return view[:, :, ::sh, ::sw, ::dh, ::dw]


def _convolve(x: Tensor, weight: Tensor, window: s.Window) -> Tensor:
    """Convolution in the common dtype of both; `weight` is `[O, I / groups, kh, kw]`."""
    groups, outputs = window.groups, len(weight)
    seen = _windows(x, weight.shape[2:], window)
    n, _, height, width, kh, kw = seen.shape
    seen = seen.reshape(n, groups, -1, height, width, kh, kw).transpose(0, 1, 3, 4, 2, 5, 6)
    rows = seen.reshape(n, groups, height * width, -1)
    kernel = weight.reshape(groups, outputs // groups, -1).transpose(0, 2, 1)
    result = rows @ kernel  # [N, groups, H' W', O / groups]
    return result.transpose(0, 1, 3, 2).reshape(n, outputs, height, width)


def _sample_scale(x: Tensor, bits: int) -> Tensor:
    """`max(max|x|, TINY) * 2^-bits` of every sample, float32, shaped `[N, 1, ..]`."""
    largest = np.abs(x).max(axis=tuple(range(1, x.ndim)), keepdims=True)
    return np.maximum(largest, np.float32(s.TINY)) * np.float32(2.0**-bits)


@singledispatch
def run_step(step: s.Step, *inputs: Tensor) -> Tensor:
    """Returns the output of one step."""
    raise ValueError(f"step: {step.op!r} is unknown to this version")


@run_step.register
def _(step: s.Normalize, x: Tensor) -> Tensor:
    return (x.astype(np.float32) - channelwise(step.offset, x)) / channelwise(step.divisor, x)


@run_step.register
def _(step: s.Codes, x: Tensor) -> Tensor:
    if step.sign is not None:
        x = x * channelwise(step.sign, x)
    codes = np.zeros(x.shape, np.uint8)
    for threshold in step.thresholds.T:
        codes += x > channelwise(threshold, x)
    return codes


@run_step.register
def _(step: s.UniformCodes, x: Tensor) -> Tensor:
    if step.offset:
        x = x - np.float32(step.offset)
    rounded = np.nan_to_num(np.rint(x / np.float32(step.step)), nan=0.0)
    return np.clip(rounded, 0, step.levels).astype(np.uint8)


@run_step.register
def _(step: s.IntConv, x: Tensor) -> Tensor:
    return _convolve(x.astype(np.int32), step.weight.astype(np.int32), step.window)


@run_step.register
def _(step: s.IntLinear, x: Tensor) -> Tensor:
    return x.astype(np.int32) @ step.weight.astype(np.int32).T


@run_step.register
def _(step: s.BorderSums) -> Tensor:
    return _convolve(np.ones((1, 1, *step.size), np.float32), step.weight, step.window)


@run_step.register
def _(step: s.FixedLinear, x: Tensor) -> Tensor:
    scale = _sample_scale(x, step.bits)
    integers, weight = np.rint(x / scale).astype(np.float64), step.weight.astype(np.float64)
    if x.ndim == 4:
        total = _convolve(integers, weight[:, :, None, None], s.Window(step.stride))
    else:
        total = integers @ weight.T
    return total.astype(np.float32) * scale


@run_step.register
def _(step: s.SplitConv, x: Tensor) -> Tensor:
    scale = _sample_scale(x, step.high_bits)
    unit = x / scale
    high = np.rint(unit)
    low = np.rint((unit - high) * np.float32(2.0**step.low_bits)) * np.float32(2.0**-step.low_bits)
    pairs = ((high, step.high), (high, step.low), (low, step.high))
    main, high_low, low_high = (_convolve(part, weight, step.window) * scale for part, weight in pairs)
    return main + (high_low + low_high)


@run_step.register
def _(step: s.MeanPool, x: Tensor) -> Tensor:
    scale = _sample_scale(x, step.bits)
    total = np.rint(x / scale).astype(np.float64).sum(axis=(2, 3), keepdims=True)
    return (total / (x.shape[2] * x.shape[3])).astype(np.float32) * scale


@run_step.register
def _(step: s.ChannelStep, x: Tensor) -> Tensor:
    return step.evaluate(x.astype(np.float32))


@run_step.register
def _(step: s.MaxPool, x: Tensor) -> Tensor:
    return _windows(x, step.kernel, step.window, -np.inf).max(axis=(-2, -1))


@run_step.register
def _(step: GridCodes, x: Tensor) -> Tensor:
    if step.sign is not None:
        x = x * channelwise(step.sign, x)
    return (count_passed(x, step.thresholds) + step.low).astype(step.dtype)


@run_step.register
def _(step: IntMaxPool, x: Tensor) -> Tensor:
    return _windows(x, step.kernel, step.window).max(axis=(-2, -1))


run_step.register(IntAdd, lambda step, left, right: left.astype(np.int32) + right.astype(np.int32))
run_step.register(SumPool, lambda step, x: x.sum(axis=(2, 3), keepdims=True, dtype=np.int32))
run_step.register(s.Add, lambda step, left, right: left + right)
run_step.register(s.Mul, lambda step, left, right: left * right)
run_step.register(s.Concat, lambda step, *inputs: np.concatenate(inputs, axis=1))
run_step.register(s.Flatten, lambda step, x: x.reshape(len(x), -1))
