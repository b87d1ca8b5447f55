"""Standard ONNX nodes for everything but the integer layers and the quantizers."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import numpy as np
from onnx import TensorProto

from lightning_n2uq.export.formats.onnx_graph import GraphWriter, TensorLayout
from lightning_n2uq.export.ir import steps as s


@singledispatch
def write_float(step: s.Step, writer: GraphWriter) -> TensorLayout:
    """Adds the step's nodes; its output tensor has the step's name. Returns the output's layout."""
    raise ValueError(f"step: {step.op!r} has no ONNX form in this version")


@write_float.register
def _(step: s.Input, writer: GraphWriter) -> TensorLayout:
    return "NCHW"


def _sources(step: s.Step, writer: GraphWriter) -> tuple[list[str], TensorLayout]:
    """Returns the inputs in one layout: that of the first."""
    layout = writer.layouts[step.inputs[0]]
    return [writer.in_layout(name, layout) for name in step.inputs], layout


@write_float.register
def _(step: s.Normalize, writer: GraphWriter) -> TensorLayout:
    (x,), layout = _sources(step, writer)
    x = writer.cast(x, TensorProto.FLOAT)
    x = writer.op("Sub", [x, writer.channelwise(step.offset, layout)])
    writer.op("Div", [x, writer.channelwise(step.divisor, layout)], step.name)
    return layout


@write_float.register
def _(step: s.Affine, writer: GraphWriter) -> TensorLayout:
    (x,), layout = _sources(step, writer)
    parts = [("Mul", step.scale), ("Add", step.shift)]
    todo = [(kind, array) for kind, array in parts if array is not None]
    if step.inputs[0] in writer.integers:
        x = writer.cast(x, TensorProto.FLOAT, None if todo else step.name)
    elif not todo:
        writer.op("Identity", [x], step.name)
    for index, (kind, array) in enumerate(todo, 1):
        output = step.name if index == len(todo) else None
        x = writer.op(kind, [x, writer.repeated(array, step.name, layout)], output)
    return layout


@write_float.register
def _(step: s.PReLU, writer: GraphWriter) -> TensorLayout:
    (x,), layout = _sources(step, writer)
    slope = writer.repeated(step.slope, step.name, layout)
    if ((step.slope >= 0) & (step.slope <= 1)).all():
        # The same value in two vectorized nodes; onnxruntime's PRelu is several times slower.
        writer.op("Max", [x, writer.op("Mul", [x, slope])], step.name)
    else:
        writer.op("PRelu", [x, slope], step.name)
    return layout


@write_float.register
def _(step: s.Clamp, writer: GraphWriter) -> TensorLayout:
    (x,), layout = _sources(step, writer)
    if step.low == 0 and np.isinf(step.high):
        writer.op("Relu", [x], step.name)
    else:
        limits = (writer.const(np.float32(limit)) for limit in (step.low, step.high))
        writer.op("Clip", [x, *limits], step.name)
    return layout


@write_float.register(s.Add)
@write_float.register(s.Mul)
def _(step: s.Step, writer: GraphWriter) -> TensorLayout:
    sources, layout = _sources(step, writer)
    writer.op("Add" if isinstance(step, s.Add) else "Mul", sources, step.name)
    return layout


@write_float.register
def _(step: s.Concat, writer: GraphWriter) -> TensorLayout:
    sources, layout = _sources(step, writer)
    writer.op("Concat", sources, step.name, axis=1 if layout == "NCHW" else -1)
    return layout


@write_float.register
def _(step: s.Flatten, writer: GraphWriter) -> TensorLayout:
    if step.inputs[0] in writer.integers:
        writer.integers.add(step.name)
    writer.op("Flatten", [writer.in_layout(step.inputs[0], "NCHW")], step.name, axis=1)
    return "flat"


@write_float.register
def _(step: s.MaxPool, writer: GraphWriter) -> TensorLayout:
    x = writer.in_layout(step.inputs[0], "NCHW")
    attributes = window_attributes(step.window)
    del attributes["group"]
    writer.op("MaxPool", [x], step.name, kernel_shape=step.kernel, **attributes)
    return "NCHW"


def _fixed_point(x: str, scale: str, writer: GraphWriter) -> str:
    return writer.cast(writer.op("Round", [writer.op("Div", [x, scale])]), TensorProto.DOUBLE)


def _sample_scale(x: str, rank: int, bits: int, writer: GraphWriter) -> str:
    largest = writer.op("ReduceMax", [writer.op("Abs", [x]), writer.ints(*range(1, rank))], keepdims=1)
    largest = writer.op("Max", [largest, writer.const(np.float32(s.TINY))])
    return writer.op("Mul", [largest, writer.const(np.float32(2.0**-bits))])


@write_float.register
def _(step: s.MeanPool, writer: GraphWriter) -> TensorLayout:
    (x,), layout = _sources(step, writer)
    shape = writer.shapes[step.inputs[0]]
    scale = _sample_scale(x, 4, step.bits, writer)
    integers = _fixed_point(x, scale, writer)
    axes = (2, 3) if layout == "NCHW" else (1, 2)
    total = writer.op("ReduceSum", [integers, writer.ints(*axes)], keepdims=1)
    mean = writer.op("Div", [total, writer.const(np.float64(shape[1] * shape[2]))])
    writer.op("Mul", [writer.cast(mean, TensorProto.FLOAT), scale], step.name)
    return layout


@write_float.register
def _(step: s.FixedLinear, writer: GraphWriter) -> TensorLayout:
    source = step.inputs[0]
    flat = writer.layouts[source] == "flat"
    x = source if flat else writer.in_layout(source, "NHWC")
    strided = step.stride != (1, 1)
    last = np.iinfo(np.int64).max
    vectors = ((0, 0), (last, last), (1, 2), step.stride) if strided else ()
    bounds = [writer.ints(*vector) for vector in vectors]
    scale = _sample_scale(x, 2 if flat else 4, step.bits, writer)
    if strided:
        x = writer.op("Slice", [x, *bounds])
    integers = _fixed_point(x, scale, writer)
    # Stored as float32, which holds these integers, and widened when the file is loaded.
    weight = writer.cast(writer.const(step.weight.T.astype(np.float32)), TensorProto.DOUBLE)
    total = writer.cast(writer.op("MatMul", [integers, weight]), TensorProto.FLOAT)
    writer.op("Mul", [total, scale], step.name)
    return "flat" if flat else "NHWC"


@write_float.register
def _(step: s.SplitConv, writer: GraphWriter) -> TensorLayout:
    x = writer.in_layout(step.inputs[0], "NCHW")
    scale = _sample_scale(x, 4, step.high_bits, writer)
    unit = writer.op("Div", [x, scale])
    high = writer.op("Round", [unit])
    factor, inverse = (writer.const(np.float32(2.0**power)) for power in (step.low_bits, -step.low_bits))
    rest = writer.op("Mul", [writer.op("Sub", [unit, high]), factor])
    low = writer.op("Mul", [writer.op("Round", [rest]), inverse])
    # The product comes before the sums: onnxruntime would fuse a sum into the convolution in front of it,
    # where it takes part in the accumulation and is rounded otherwise.
    pairs = ((high, step.high), (high, step.low), (low, step.high))
    sums = (convolution(writer, part, writer.const(w), w.shape[2:], step.window) for part, w in pairs)
    main, high_low, low_high = (writer.op("Mul", [part, scale]) for part in sums)
    writer.op("Add", [main, writer.op("Add", [high_low, low_high])], step.name)
    return "NCHW"


@write_float.register
def _(step: s.BorderSums, writer: GraphWriter) -> TensorLayout:
    shape = writer.ints(1, 1, *step.size)
    ones = writer.op("Expand", [writer.const(np.ones((1, 1, 1, 1), np.float32)), shape])
    sums = convolution(writer, ones, writer.const(step.weight), step.weight.shape[2:], step.window)
    write_integer_sums(step, sums, writer)
    return "NCHW"


def write_integer_sums(step: s.Step, sums: str, writer: GraphWriter) -> None:
    """Gives float sums of integers the step's name, through int32.

    Otherwise onnxruntime would multiply the scale behind into the weights, and sums would round.
    """
    writer.cast(sums, TensorProto.INT32, step.name)
    writer.integers.add(step.name)


def convolution(
    writer: GraphWriter,
    x: str,
    weight: str,
    kernel: tuple[int, ...],
    window: s.Window,
    output: str | None = None,
) -> str:
    """Adds a float convolution in `NCHW`."""
    return writer.op("Conv", [x, weight], output, kernel_shape=kernel, **window_attributes(window))


def window_attributes(window: s.Window) -> dict[str, Any]:
    """Returns a window as attributes of ONNX's convolutions."""
    return {
        "strides": window.stride,
        "pads": window.pads,
        "dilations": window.dilation,
        "group": window.groups,
    }
