"""Standard ONNX nodes of integer-only networks: every map is uint8.

A signed grid's value is stored as its index, `value - low`, so that zero is `-low`: layers take that as their
zero point, padding writes it, and sums take it off. What reads few different values (codes, their sums,
pixels) is a table per channel.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from lightning_n2uq.export.formats.onnx_graph import GraphWriter, TensorLayout
from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.integer_steps import GridCodes, IntAdd, IntMaxPool, SumPool
from lightning_n2uq.export.runtime.numpy_engine import run_step

COMPARED = 3
"""Number of thresholds up to which comparisons take less time than a lookup."""


def zero_of(name: str, writer: GraphWriter) -> int:
    """Returns which stored number stands for zero in a step's value."""
    step = next(step for step in writer.description.steps if step.name == name)
    if isinstance(step, s.Flatten | IntMaxPool):
        return zero_of(step.inputs[0], writer)
    return -step.low if isinstance(step, GridCodes) else 0


def stored_range(name: str, writer: GraphWriter) -> tuple[int, int] | None:
    """Returns a step's smallest value and how many it can have, None if those are too many for a table."""
    step = next(step for step in writer.description.steps if step.name == name)
    if isinstance(step, IntMaxPool):
        return stored_range(step.inputs[0], writer)
    if isinstance(step, GridCodes):
        return step.low, step.levels + 1
    if isinstance(step, IntAdd):
        low, count = stored_range(step.inputs[0], writer) or (0, 0)
        return 2 * low, 2 * count - 1
    if isinstance(step, s.Input) and step.dtype == "uint8":
        return 0, 256
    return None


def write_table(step: s.Codes, writer: GraphWriter) -> TensorLayout | None:
    """Adds a step of thresholds as a table of its input's values; returns None where those are too many."""
    (source,) = step.inputs
    found = stored_range(source, writer)
    if found is None:
        return None
    low, count = found
    layout = writer.layouts[source]
    index = writer.cast(source, TensorProto.INT32)
    if step.levels <= COMPARED and step.sign is None and step.thresholds.dtype == np.int32:
        _compare_each(step, index, low, layout, writer)
    else:
        _look_up(step, index, low, count, layout, writer)
    writer.integers.add(step.name)
    return layout


def _compare_each(step: s.Codes, x: str, low: int, layout: TensorLayout, writer: GraphWriter) -> None:
    """Adds comparisons of what is stored, `x`, with every threshold, counted in bytes."""
    codes = ""
    for index, threshold in enumerate(step.thresholds.T, 1):
        passed = writer.op("Greater", [x, writer.repeated(threshold - np.int32(low), step.name, layout)])
        last = step.name if index == step.levels else None
        one = writer.cast(passed, TensorProto.UINT8, last if step.levels == 1 else None)
        codes = writer.op("Add", [codes, one], last) if codes else one


def _look_up(
    step: s.Codes, index: str, low: int, count: int, layout: TensorLayout, writer: GraphWriter
) -> None:
    """Adds the lookup of what the step makes of each of the `count` values from `low` on."""
    channels = writer.shapes[step.name][0]
    values = np.broadcast_to(np.arange(low, low + count, dtype=np.int32), (1, channels, count))
    lowest = step.low if isinstance(step, GridCodes) else 0
    table = (run_step(step, values[..., None])[0, :, :, 0].astype(np.int32) - lowest).astype(np.uint8)
    if (table == table[:1]).all():
        table = table[:1]
    else:
        index = writer.op("Add", [index, writer.repeated(_starts(channels, count), step.name, layout)])
    # A quarter of what Gather takes, which copies value by value.
    flat = writer.op("Reshape", [index, writer.ints(1, -1)])
    found = writer.op("GatherElements", [writer.const(table.reshape(1, -1)), flat], axis=1)
    writer.op("Reshape", [found, writer.op("Shape", [index])], step.name)


def _starts(channels: int, count: int) -> NDArray[np.int32]:
    return np.arange(channels, dtype=np.int32) * np.int32(count)


def write_sum(step: IntAdd, writer: GraphWriter) -> TensorLayout:
    """Adds the sum of two stored maps, int32: an index into the tables behind it."""
    layout = writer.layouts[step.inputs[0]]
    parts = [writer.cast(writer.in_layout(name, layout), TensorProto.INT32) for name in step.inputs]
    writer.op("Add", parts, step.name)
    writer.integers.add(step.name)
    return layout


def write_sum_pool(step: SumPool, writer: GraphWriter) -> TensorLayout:
    """Adds the sum over height and width, int32."""
    (source,) = step.inputs
    layout, (_, height, width) = writer.layouts[source], writer.shapes[source]
    axes = (1, 2) if layout == "NHWC" else (2, 3)
    wide = writer.cast(source, TensorProto.INT32)
    total = writer.op("ReduceSum", [wide, writer.ints(*axes)], keepdims=1)
    zeros = writer.const(np.int32(zero_of(source, writer) * height * width))
    writer.op("Sub", [total, zeros], step.name)
    writer.integers.add(step.name)
    return layout


def as_unsigned(step: GridCodes) -> s.Codes:
    """Returns the step that gives what is stored."""
    return s.Codes(step.name, step.inputs, step.thresholds, step.sign)


def as_max_pool(step: IntMaxPool) -> s.MaxPool:
    """Returns the same pooling of any values; that of uint8 surrounds the map with zeros."""
    return s.MaxPool(step.name, step.inputs, step.kernel, replace(step.window))
