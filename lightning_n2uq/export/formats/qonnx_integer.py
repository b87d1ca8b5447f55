"""QONNX nodes of integer-only networks, in the forms that FINN's passes look for.

Signed grids are `MultiThreshold` nodes with a negative `out_bias`; both inputs of an `Add` have one datatype.
Pooling is `GlobalAveragePool`, since FINN turns that into an accumulation: the thresholds behind it lie
half-way between the means of two neighbouring sums, where no rounding of a mean reaches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_n2uq.export.formats.onnx_float import write_float
from lightning_n2uq.export.formats.onnx_graph import GraphWriter, TensorLayout
from lightning_n2uq.export.formats.qonnx_file import multi_threshold, write_quantized
from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.integer_steps import GridCodes, IntAdd, IntMaxPool, SumPool
from lightning_n2uq.export.ir.thresholds import at_least

Notes = dict[str, str]


@write_quantized.register
def _(step: GridCodes, writer: GraphWriter, annotations: Notes) -> TensorLayout:
    kind = "UINT" if step.low == 0 else "INT"
    datatype = f"{kind}{(step.high if step.low == 0 else 2 * step.high).bit_length()}"
    places = _places_behind_pooling(step, writer)
    thresholds = at_least(step.thresholds) if places is None else _between(step.thresholds, places)
    return multi_threshold(step, thresholds, writer, annotations, datatype, step.low)


def _places_behind_pooling(step: s.Step, writer: GraphWriter) -> int | None:
    """Returns over how many places the step's input is averaged, None where it is not."""
    (source,) = step.inputs
    origin = next(other for other in writer.description.steps if other.name == source)
    if isinstance(origin, s.Flatten):
        return _places_behind_pooling(origin, writer)
    if not isinstance(origin, SumPool):
        return None
    _, height, width = writer.shapes[origin.inputs[0]]
    return height * width


def _between(thresholds: NDArray[Any], places: int) -> NDArray[np.float32]:
    middle: NDArray[np.float32] = ((thresholds + 0.5) / places).astype(np.float32)
    return middle


@write_quantized.register
def _(step: SumPool, writer: GraphWriter, annotations: Notes) -> TensorLayout:
    writer.op("GlobalAveragePool", [writer.in_layout(step.inputs[0], "NCHW")], step.name)
    return "NCHW"


@write_quantized.register
def _(step: IntAdd, writer: GraphWriter, annotations: Notes) -> TensorLayout:
    bits = int(annotations[step.inputs[0]].removeprefix("INT"))
    annotations[step.name] = f"INT{bits + 1}"
    writer.op("Add", [writer.in_layout(name, "NCHW") for name in step.inputs], step.name)
    return "NCHW"


@write_quantized.register
def _(step: IntMaxPool, writer: GraphWriter, annotations: Notes) -> TensorLayout:
    annotations[step.name] = annotations[step.inputs[0]]
    return write_float(step, writer)
