"""Standard ONNX nodes for the quantizers and the integer layers.

Dense integer convolutions are written as `MatMulInteger` over gathered windows in channels-last layout
(`convolution="matmul"`), since onnxruntime runs that several times faster than `ConvInteger`; grouped ones,
and all with `convolution="conv"`, as `ConvInteger`.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from lightning_n2uq.export.formats import onnx_grids
from lightning_n2uq.export.formats.onnx_float import (
    convolution,
    window_attributes,
    write_float,
    write_integer_sums,
)
from lightning_n2uq.export.formats.onnx_graph import GraphWriter, TensorLayout
from lightning_n2uq.export.formats.onnx_lookup import find_buckets, write_lookup
from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.integer_steps import GridCodes, IntAdd, IntMaxPool, SumPool
from lightning_n2uq.export.ir.packing import from_codes, to_codes

PAIR_LIMIT = 2**15 - 1
"""x86 kernels without VNNI add two products of unsigned and signed bytes in 16 bits, and saturate."""
LOOKUP_FROM = 15
"""Number of thresholds from which a lookup takes less time than one comparison each."""
SEARCH_FROM = 127
"""Number of thresholds from which a binary search takes fewer nodes than one comparison each."""


@singledispatch
def write_step(step: s.Step, writer: GraphWriter) -> TensorLayout:
    """Adds the step's nodes; its output tensor has the step's name. Returns the output's layout."""
    return write_float(step, writer)


@write_step.register
def _(step: s.UniformCodes, writer: GraphWriter) -> TensorLayout:
    (source,) = step.inputs
    x = source
    if step.offset:
        x = writer.op("Sub", [x, writer.const(np.float32(step.offset))])
    arguments = [x, writer.const(np.float32(step.step)), writer.const(np.uint8(0))]
    codes = writer.op("QuantizeLinear", arguments, step.name if step.levels == 255 else None)
    if step.levels < 255:
        writer.op("Min", [codes, writer.const(np.uint8(step.levels))], step.name)
    writer.integers.add(step.name)
    return writer.layouts[source]


@write_step.register
def _(step: s.Codes, writer: GraphWriter) -> TensorLayout:
    table = onnx_grids.write_table(step, writer)
    if table is not None:
        return table
    (x,) = step.inputs
    layout = writer.layouts[x]
    if layout == "NCHW" and step.levels >= SEARCH_FROM and writer.layout == "NHWC":
        layout, x = "NHWC", writer.in_layout(x, "NHWC")  # where lookups are at hand
    if step.sign is not None:
        x = writer.op("Mul", [x, writer.repeated(step.sign, step.name, layout)])
    buckets = None
    if layout == "NHWC" and step.levels >= LOOKUP_FROM:
        channels = writer.shapes[step.name][0]
        thresholds = np.broadcast_to(step.thresholds, (channels, step.levels))
        buckets = find_buckets(thresholds)
    if buckets is not None:
        write_lookup(step.name, x, thresholds, buckets, writer)
    else:
        (_search if step.levels >= SEARCH_FROM else _compare_each)(step, x, layout, writer)
    writer.integers.add(step.name)
    return layout


@write_step.register
def _(step: GridCodes, writer: GraphWriter) -> TensorLayout:
    table = onnx_grids.write_table(step, writer)
    return write_step(onnx_grids.as_unsigned(step), writer) if table is None else table


@write_step.register
def _(step: IntMaxPool, writer: GraphWriter) -> TensorLayout:
    writer.integers.add(step.name)
    return write_float(onnx_grids.as_max_pool(step), writer)


write_step.register(IntAdd, onnx_grids.write_sum)
write_step.register(SumPool, onnx_grids.write_sum_pool)


def _compare_each(step: s.Codes, x: str, layout: TensorLayout, writer: GraphWriter) -> None:
    """Adds comparisons with every threshold, counted in bytes."""
    codes = ""
    for index, threshold in enumerate(step.thresholds.T, 1):
        limit = writer.repeated(threshold, step.name, layout)
        passed = writer.op("Greater", [x, limit])
        last = step.name if index == step.levels else None
        one = writer.cast(passed, TensorProto.UINT8, last if step.levels == 1 else None)
        codes = writer.op("Add", [codes, one], last) if codes else one


def _search(step: s.Codes, x: str, layout: TensorLayout, writer: GraphWriter) -> None:
    """Adds a binary search over `2^b - 1` thresholds, one bit of the code after the other.

    Fewer thresholds are filled up with ones that nothing exceeds.
    """
    thresholds, kind = step.thresholds, step.thresholds.dtype
    never = np.inf if np.issubdtype(kind, np.floating) else np.iinfo(kind).max
    missing = 2 ** step.levels.bit_length() - 1 - step.levels
    thresholds = np.pad(thresholds, ((0, 0), (0, missing)), constant_values=never).astype(kind)
    rows, levels = thresholds.shape
    table = writer.const(thresholds.reshape(-1))
    codes = writer.op("Mul", [writer.cast(x, TensorProto.INT32), writer.const(np.int32(0))])
    for bit in reversed(range(levels.bit_length())):
        place = np.arange(rows, dtype=np.int32) * levels + (2**bit - 1)
        index = writer.op("Add", [codes, writer.channelwise(place.astype(np.int32), layout)])
        passed = writer.op("Greater", [x, writer.op("Gather", [table, index])])
        step_up = writer.op("Mul", [writer.cast(passed, TensorProto.INT32), writer.const(np.int32(2**bit))])
        codes = writer.op("Add", [codes, step_up])
    writer.cast(codes, TensorProto.UINT8, step.name)


@write_step.register
def _(step: s.IntLinear, writer: GraphWriter) -> TensorLayout:
    if _takes_qdq(step, writer):
        return _write_qdq(step, writer, "flat")
    _accumulate(step, "MatMulInteger", step.inputs[0], step.weight.T, writer)
    return "flat"


@write_step.register
def _(step: s.IntConv, writer: GraphWriter) -> TensorLayout:
    if _takes_qdq(step, writer):
        return _write_qdq(step, writer, "NCHW")
    if step.window.groups == 1 and writer.layout == "NHWC":
        x = _gather_windows(step, writer.in_layout(step.inputs[0], "NHWC"), writer)
        rows = step.weight.transpose(3, 2, 1, 0).reshape(-1, len(step.weight))
        _accumulate(step, "MatMulInteger", x, rows, writer)
        return "NHWC"
    x = writer.in_layout(step.inputs[0], "NCHW")
    _accumulate(step, "ConvInteger", x, step.weight, writer, **window_attributes(step.window))
    return "NCHW"


def _gather_windows(step: s.IntConv, x: str, writer: GraphWriter) -> str:
    """`[N, H, W, C]` to `[N, H', W', kw kh C]`: what the kernel sees, first down, then across."""
    window, kernel = step.window, step.weight.shape[2:]
    top, left, bottom, right = window.pads
    if any(window.pads):
        zero = onnx_grids.zero_of(step.inputs[0], writer)
        fill = [writer.const(np.uint8(zero))] if zero else []
        x = writer.op("Pad", [x, writer.ints(0, top, left, 0, 0, bottom, right, 0), *fill])
    places = zip((1, 2), kernel, window.dilation, window.stride, strict=True)
    for axis, size, dilation, stride in places:
        if size == 1 and stride == 1:
            continue
        parts = []
        for offset in range(size):
            rest = (size - 1 - offset) * dilation
            end = -rest if rest else np.iinfo(np.int64).max
            bounds = (writer.ints(v) for v in (offset * dilation, end, axis, stride))
            parts.append(writer.op("Slice", [x, *bounds]))
        x = writer.op("Concat", parts, axis=3) if size > 1 else parts[0]
    return x


def _accumulate(
    step: s.IntConv,
    kind: str,
    x: str,
    weight: NDArray[Any],
    writer: GraphWriter,
    **attributes: Any,  # noqa: ANN401
) -> None:
    """Adds the integer product to int32; `weight` is `[O, I, kh, kw]` or `[I, O]`, as `kind` takes it."""
    writer.integers.add(step.name)
    stored = onnx_grids.zero_of(step.inputs[0], writer)
    zero = writer.const(np.uint8(stored))
    if not step.odd or step.bits < 8:
        # onnxruntime has fast kernels for ConvInteger with unsigned weights only.
        largest = int(np.abs(weight).max(initial=0))
        unsigned = kind == "ConvInteger" or 2 * (step.levels + stored) * largest > PAIR_LIMIT
        name, point = _stored_weight(step, weight, writer, 128 if unsigned else 0)
        writer.op(kind, [x, name, zero, writer.const(point)], step.name, **attributes)
        return
    # Odd integers of 8 bits do not fit a byte: w = 2 q - 255, so the sum over the inputs is taken off.
    codes = writer.const(to_codes(weight, step.bits, step.odd))
    main = writer.op(kind, [x, codes, zero, zero], **attributes)
    ones = np.ones(weight.shape if kind == "ConvInteger" else (len(weight), 1), np.uint8)
    inputs = writer.op(kind, [x, writer.const(ones), zero, zero], **attributes)
    doubled = writer.op("Mul", [main, writer.const(np.int32(2))])
    offset = writer.op("Mul", [inputs, writer.const(np.int32(255))])
    writer.op("Sub", [doubled, offset], step.name)


def _stored_weight(
    step: s.IntConv, weight: NDArray[Any], writer: GraphWriter, point: int
) -> tuple[str, np.generic]:
    """Returns the weight as bytes and their zero point; up to 4 bits are stored packed."""
    dtype = np.uint8 if point else np.int8
    if step.bits > 4:
        return writer.const((weight + point).astype(dtype)), dtype(point)
    storage = 2 if step.bits == 2 and writer.opset >= 25 else 4
    packed = writer.packed(to_codes(weight, step.bits, step.odd), storage)
    levels = from_codes(np.arange(2**step.bits), step.bits, step.odd)
    table = writer.const((levels + point).astype(dtype))
    return writer.op("Gather", [table, writer.cast(packed, TensorProto.INT32)]), dtype(point)


def _takes_qdq(step: s.IntConv, writer: GraphWriter) -> bool:
    """Returns whether a uniform quantizer is in front, weights are bytes and float32 holds the sums."""
    source = next(other for other in writer.description.steps if other.name == step.inputs[0])
    fits = not (step.odd and step.bits == 8) and not step.needs_float64
    return isinstance(source, s.UniformCodes) and fits


def _write_qdq(step: s.IntConv, writer: GraphWriter, layout: TensorLayout) -> TensorLayout:
    """Adds quantize-dequantize nodes. Both scales are 1: sums stay integers, the real scales come after."""
    one = writer.const(np.float32(1))
    codes = writer.in_layout(step.inputs[0], layout)
    x = writer.op("DequantizeLinear", [codes, one, writer.const(np.uint8(0))])
    name, point = _stored_weight(step, step.weight if layout == "NCHW" else step.weight.T, writer, 0)
    weight = writer.op("DequantizeLinear", [name, one, writer.const(point)])
    if layout == "NCHW":
        sums = convolution(writer, x, weight, step.weight.shape[2:], step.window)
    else:
        sums = writer.op("MatMul", [x, weight])
    write_integer_sums(step, sums, writer)
    return layout
