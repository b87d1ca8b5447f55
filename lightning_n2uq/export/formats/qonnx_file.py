"""QONNX files, for FPGA flows such as FINN: `MultiThreshold` nodes and integer weights in float32 tensors.

Every tensor is float32 and carries the datatype of the integers in it as an annotation; codes, weights and
accumulators stay below 2^24, where float32 is exact. Umuroglu et al., FINN, FPGA 2017, arXiv 1612.07119;
Pappalardo et al., QONNX, 2022, arXiv 2206.07527.
"""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import StringStringEntryProto, TensorAnnotation, TensorProto

from lightning_n2uq.export.formats.onnx_float import convolution, write_float
from lightning_n2uq.export.formats.onnx_graph import GraphWriter, TensorLayout, save_model
from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.description import Description, with_output_named
from lightning_n2uq.export.ir.thresholds import at_least, uniform_thresholds

DOMAIN = "qonnx.custom_op.general"
OPSET = 21


def to_qonnx(description: Description, batch: int | None = None) -> onnx.ModelProto:
    """Returns the network as a QONNX model.

    Args:
        description: The network to write.
        batch: Size of the batch; None leaves it open (FINN wants it fixed).

    Raises:
        ValueError: A sum can pass 2^24.
    """
    import lightning_n2uq.export.formats.qonnx_integer  # noqa: F401 -- registers its steps

    writer = GraphWriter(description, "NCHW", OPSET)
    annotations: dict[str, str] = {}
    if pixels_are_integers(description):
        annotations[description.input.name] = "UINT8"
    for step in description.steps:
        writer.layouts[step.name] = write_quantized(step, writer, annotations)
    model = writer.file({description.output: TensorProto.FLOAT}, {"": OPSET, DOMAIN: 1}, batch)
    if pixels_are_integers(description):
        model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor, datatype in annotations.items():
        entry = StringStringEntryProto(key="finn_datatype", value=datatype)
        model.graph.quantization_annotation.append(
            TensorAnnotation(tensor_name=tensor, quant_parameter_tensor_names=[entry])
        )
    return model


def pixels_are_integers(description: Description) -> bool:
    """Returns whether the network reads its pixels as integers, which FINN wants in a float32 tensor."""
    return description.input.dtype == "uint8" and description.normalize is None


def save_qonnx(description: Description, path: str | Path, batch: int | None = None) -> None:
    """Writes `to_qonnx`'s model to a file."""
    save_model(to_qonnx(with_output_named(description), batch), path)


def with_batch(description: Description, model: bytes | None, batch: int) -> onnx.ModelProto:
    """Returns a QONNX model, written anew if None, with the fixed batch size that its executor wants."""
    if model is None:
        return to_qonnx(description, batch)
    proto = onnx.ModelProto.FromString(model)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return proto


@singledispatch
def write_quantized(step: s.Step, writer: GraphWriter, annotations: dict[str, str]) -> TensorLayout:
    """Adds the step's nodes and the datatypes of its tensors; returns the output's layout."""
    return write_float(step, writer)


@write_quantized.register
def _(step: s.UniformCodes, writer: GraphWriter, annotations: dict[str, str]) -> TensorLayout:
    datatype = f"UINT{step.levels.bit_length()}"
    return multi_threshold(step, at_least(uniform_thresholds(step)), writer, annotations, datatype)


@write_quantized.register
def _(step: s.Codes, writer: GraphWriter, annotations: dict[str, str]) -> TensorLayout:
    datatype = f"UINT{step.levels.bit_length()}"
    return multi_threshold(step, at_least(step.thresholds), writer, annotations, datatype)


def multi_threshold(
    step: s.Codes | s.UniformCodes,
    thresholds: NDArray[np.float32],
    writer: GraphWriter,
    annotations: dict[str, str],
    datatype: str,
    lowest: int = 0,
) -> TensorLayout:
    """Adds the `MultiThreshold` node of a step, behind a product with its signs where it has some.

    Args:
        step: The step, whose name the output gets.
        thresholds: What values have to reach, `[C, n]` or `[1, n]`.
        writer: The graph.
        annotations: The datatypes of tensors, to which the output's is added.
        datatype: The output's.
        lowest: The output where no threshold is reached.
    """
    x, sign = writer.in_layout(step.inputs[0], "NCHW"), getattr(step, "sign", None)
    layout: TensorLayout = "flat" if writer.layouts[step.inputs[0]] == "flat" else "NCHW"
    if sign is not None:
        x = writer.op("Mul", [x, writer.channelwise(sign.astype(np.float32), layout)])
    annotations[step.name], table = datatype, writer.const(thresholds)
    if (thresholds == np.rint(thresholds)).all() and np.isfinite(thresholds).all():
        annotations[table] = integer_type(thresholds)
    writer.op(
        "MultiThreshold",
        [x, table],
        step.name,
        domain=DOMAIN,
        out_dtype=datatype,
        out_scale=1.0,
        out_bias=float(lowest),
        data_layout="NCHW",  # of features too: the qonnx that FINN pins knows no other name for them
    )
    return layout


def integer_type(values: NDArray[np.float32]) -> str:
    """Returns the smallest signed datatype that holds the integers."""
    largest = int(np.maximum(values, -1 - values).max(initial=0))
    return f"INT{largest.bit_length() + 1}"


def _weight(step: s.IntConv, weight: NDArray[Any], writer: GraphWriter, notes: dict[str, str]) -> str:
    if step.needs_float64:
        raise ValueError(
            f"{step.name}: its sums can pass 2^24, which QONNX's float32 tensors do not hold exactly; "
            "use fewer bits, or the format onnx"
        )
    name = writer.const(weight.astype(np.float32))
    notes[name] = f"INT{step.bits + 1 if step.odd else step.bits}"
    return name


@write_quantized.register
def _(step: s.IntConv, writer: GraphWriter, annotations: dict[str, str]) -> TensorLayout:
    x = writer.in_layout(step.inputs[0], "NCHW")
    weight = _weight(step, step.weight, writer, annotations)
    convolution(writer, x, weight, step.weight.shape[2:], step.window, step.name)
    return "NCHW"


@write_quantized.register
def _(step: s.IntLinear, writer: GraphWriter, annotations: dict[str, str]) -> TensorLayout:
    writer.op("MatMul", [step.inputs[0], _weight(step, step.weight.T, writer, annotations)], step.name)
    return "flat"
