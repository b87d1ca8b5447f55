"""Shapes of what steps put out, without the batch: `(C, H, W)` or `(F,)`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch

from lightning_n2uq.export.ir import steps as s

Shape = tuple[int, ...]


@singledispatch
def output_shape(step: s.Step, inputs: Sequence[Shape]) -> Shape:
    """Shape of the step's output from those of its inputs; by default that of the first.

    Raises:
        ValueError: the shapes do not fit the step.
    """
    return inputs[0]


def infer_shapes(steps: Sequence[s.Step]) -> dict[str, Shape]:
    """Shapes by step name."""
    shapes: dict[str, Shape] = {}
    for step in steps:
        shapes[step.name] = output_shape(step, [shapes[name] for name in step.inputs])
    return shapes


def window_size(size: Shape, kernel: Shape, window: s.Window) -> Shape:
    """Height and width behind a moving kernel."""
    top, left, bottom, right = window.pads
    padded = (size[0] + top + bottom, size[1] + left + right)
    places = zip(padded, kernel, window.dilation, window.stride, strict=True)
    return tuple((p - d * (k - 1) - 1) // stride + 1 for p, k, d, stride in places)


def _windowed(step: s.Step, weight_shape: Shape, window: s.Window, image: Shape) -> Shape:
    outputs, inputs = weight_shape[0], weight_shape[1] * window.groups
    if len(image) != 3 or image[0] != inputs:
        raise ValueError(f"{step.name}: its input is {list(image)}, allowed is [{inputs}, H, W]")
    size = window_size(image[1:], weight_shape[2:], window)
    if min(size) < 1:
        raise ValueError(f"{step.name}: its input {list(image)} is smaller than the kernel")
    return (outputs, *size)


@output_shape.register
def _(step: s.Input, inputs: Sequence[Shape]) -> Shape:
    return step.shape


@output_shape.register
def _(step: s.IntConv, inputs: Sequence[Shape]) -> Shape:
    return _windowed(step, step.weight.shape, step.window, inputs[0])


@output_shape.register
def _(step: s.SplitConv, inputs: Sequence[Shape]) -> Shape:
    return _windowed(step, step.high.shape, step.window, inputs[0])


@output_shape.register
def _(step: s.IntLinear, inputs: Sequence[Shape]) -> Shape:
    return _features(step, step.weight.shape, inputs[0])


@output_shape.register
def _(step: s.FixedLinear, inputs: Sequence[Shape]) -> Shape:
    if len(inputs[0]) == 1:
        return _features(step, step.weight.shape, inputs[0])
    return _windowed(step, (*step.weight.shape, 1, 1), s.Window(step.stride), inputs[0])


def _features(step: s.Step, weight_shape: Shape, features: Shape) -> Shape:
    if features != (weight_shape[1],):
        raise ValueError(f"{step.name}: its input is {list(features)}, allowed is [{weight_shape[1]}]")
    return (weight_shape[0],)


@output_shape.register
def _(step: s.BorderSums, inputs: Sequence[Shape]) -> Shape:
    return (len(step.weight), *window_size(step.size, step.weight.shape[2:], step.window))


@output_shape.register
def _(step: s.MeanPool, inputs: Sequence[Shape]) -> Shape:
    if len(inputs[0]) != 3:
        raise ValueError(f"{step.name}: its input is {list(inputs[0])}, allowed is [C, H, W]")
    return (inputs[0][0], 1, 1)


@output_shape.register
def _(step: s.MaxPool, inputs: Sequence[Shape]) -> Shape:
    return (inputs[0][0], *window_size(inputs[0][1:], step.kernel, step.window))


@output_shape.register(s.Add)
@output_shape.register(s.Mul)
def _(step: s.Step, inputs: Sequence[Shape]) -> Shape:
    left, right = inputs
    gate = isinstance(step, s.Mul) and (left[0], 1, 1) in (left, right) and left[0] == right[0]
    if left != right and not gate:
        raise ValueError(f"{step.name}: its inputs are {list(left)} and {list(right)}, which do not fit")
    return max(left, right)


@output_shape.register
def _(step: s.Concat, inputs: Sequence[Shape]) -> Shape:
    if len({shape[1:] for shape in inputs}) != 1:
        raise ValueError(f"{step.name}: its inputs are {[list(shape) for shape in inputs]}, sizes differ")
    return (sum(shape[0] for shape in inputs), *inputs[0][1:])


@output_shape.register
def _(step: s.Flatten, inputs: Sequence[Shape]) -> Shape:
    size = 1
    for places in inputs[0]:
        size *= places
    return (size,)
