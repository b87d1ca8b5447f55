"""Shapes of what steps put out, without the batch: `(C, H, W)` or `(F,)`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import singledispatch

from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.integer_steps import IntAdd, SumPool

Shape = tuple[int, ...]


def infer_shapes(steps: Sequence[s.Step]) -> dict[str, Shape]:
    """Returns the output shapes by step name."""
    shapes: dict[str, Shape] = {}
    for step in steps:
        shapes[step.name] = output_shape(step, *(shapes[name] for name in step.inputs))
    return shapes


@singledispatch
def output_shape(step: s.Step, *inputs: Shape) -> Shape:
    """Returns the shape of the step's output from those of its inputs; by default that of the first.

    Raises:
        ValueError: The shapes do not fit the step.
    """
    return inputs[0]


@output_shape.register
def _(step: s.Input) -> Shape:
    return step.shape


def _windowed(step: s.Step, weight: Shape, window: s.Window, image: Shape) -> Shape:
    channels = weight[1] * window.groups
    if len(image) != 3 or image[0] != channels:
        raise ValueError(f"{step.name}: its input is {list(image)}, allowed is [{channels}, H, W]")
    size = window.output_size(image[1:], weight[2:])
    if min(size) < 1:
        raise ValueError(f"{step.name}: its input {list(image)} is smaller than the kernel")
    return (weight[0], *size)


def _features(step: s.Step, weight: Shape, features: Shape) -> Shape:
    if features != (weight[1],):
        raise ValueError(f"{step.name}: its input is {list(features)}, allowed is [{weight[1]}]")
    return (weight[0],)


@output_shape.register
def _(step: s.IntConv, image: Shape) -> Shape:
    return _windowed(step, step.weight.shape, step.window, image)


@output_shape.register
def _(step: s.SplitConv, image: Shape) -> Shape:
    return _windowed(step, step.high.shape, step.window, image)


@output_shape.register
def _(step: s.IntLinear, features: Shape) -> Shape:
    return _features(step, step.weight.shape, features)


@output_shape.register
def _(step: s.FixedLinear, values: Shape) -> Shape:
    if len(values) == 1:
        return _features(step, step.weight.shape, values)
    return _windowed(step, (*step.weight.shape, 1, 1), s.Window(step.stride), values)


@output_shape.register
def _(step: s.BorderSums) -> Shape:
    return (len(step.weight), *step.window.output_size(step.size, step.weight.shape[2:]))


@output_shape.register(s.MeanPool)
@output_shape.register(SumPool)
def _(step: s.Step, image: Shape) -> Shape:
    if len(image) != 3:
        raise ValueError(f"{step.name}: its input is {list(image)}, allowed is [C, H, W]")
    return (image[0], 1, 1)


@output_shape.register
def _(step: s.MaxPool, image: Shape) -> Shape:
    return (image[0], *step.window.output_size(image[1:], step.kernel))


@output_shape.register(s.Add)
@output_shape.register(IntAdd)
@output_shape.register(s.Mul)
def _(step: s.Step, left: Shape, right: Shape) -> Shape:
    gate = isinstance(step, s.Mul) and (left[0], 1, 1) in (left, right) and left[0] == right[0]
    if left != right and not gate:
        raise ValueError(f"{step.name}: its inputs are {list(left)} and {list(right)}, which do not fit")
    return max(left, right)


@output_shape.register
def _(step: s.Concat, *inputs: Shape) -> Shape:
    if len({shape[1:] for shape in inputs}) != 1:
        raise ValueError(f"{step.name}: its inputs are {[list(shape) for shape in inputs]}, sizes differ")
    return (sum(shape[0] for shape in inputs), *inputs[0][1:])


@output_shape.register
def _(step: s.Flatten, values: Shape) -> Shape:
    return (math.prod(values),)
