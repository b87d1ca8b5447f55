"""QONNX files, for FPGA flows such as FINN: `MultiThreshold` nodes and integer weights in float32 tensors.

Every tensor is float32 and carries the datatype of the integers in it as an annotation; codes, weights and
accumulators stay below 2^24, where float32 is exact. Umuroglu et al., FINN, FPGA 2017, arXiv 1612.07119;
Pappalardo et al., QONNX, 2022, arXiv 2206.07527.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import StringStringEntryProto, TensorAnnotation, TensorProto

from lightning_n2uq.export.formats.onnx_float import convolution, write_float
from lightning_n2uq.export.formats.onnx_graph import GraphWriter, Layout
from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.description import Description, needs_float64
from lightning_n2uq.export.lower.fold import last_failing_float

DOMAIN = "qonnx.custom_op.general"
OPSET = 21


def to_qonnx(
    description: Description, batch: int | None = None, code_outputs: Iterable[str] = ()
) -> onnx.ModelProto:
    """The network as a QONNX model.

    Args:
        description: the network.
        batch: size of the batch; None leaves it open (FINN wants it fixed).
        code_outputs: quantizers whose codes are further outputs, `[N, C, H, W]` or `[N, C]` float32.

    Raises:
        ValueError: a sum can pass 2^24.
    """
    writer = GraphWriter(description, "NCHW", OPSET)
    annotations: dict[str, str] = {}
    for step in description.steps:
        writer.layouts[step.name] = write_quantized(step, writer, annotations)
    outputs = dict.fromkeys((description.output, *code_outputs), TensorProto.FLOAT)
    model = writer.file(outputs, {"": OPSET, DOMAIN: 1}, batch)
    for tensor, datatype in annotations.items():
        entry = StringStringEntryProto(key="finn_datatype", value=datatype)
        model.graph.quantization_annotation.append(
            TensorAnnotation(tensor_name=tensor, quant_parameter_tensor_names=[entry])
        )
    return model


def save_qonnx(description: Description, path: str | Path, batch: int | None = None) -> None:
    """Writes `to_qonnx`'s model to a file."""
    Path(path).write_bytes(to_qonnx(description, batch).SerializeToString())


@singledispatch
def write_quantized(step: s.Step, writer: GraphWriter, annotations: dict[str, str]) -> Layout:
    """Adds the step's nodes and the datatypes of its tensors; returns the output's layout."""
    return write_float(step, writer)


def at_least(thresholds: NDArray[Any]) -> NDArray[np.float32]:
    """Thresholds for `>=` that pass the same values as the given ones do for `>`.

    Integers: the next integer. Float32: the next float32; behind the largest comes infinity.
    """
    if np.issubdtype(thresholds.dtype, np.integer):
        return (thresholds + 1).astype(np.float32)
    with np.errstate(over="ignore"):  # the largest float32 has infinity behind it, as wanted
        behind: NDArray[np.float32] = np.nextafter(thresholds, np.float32(np.inf))
    return behind


def uniform_thresholds(step: s.UniformCodes) -> NDArray[np.float32]:
    """`[1, n]`: the largest float32 whose code is below `k`, for `k = 1 .. n`."""
    places = np.arange(1, step.levels + 1)[None]
    divisor, offset = np.float32(step.step), np.float32(step.offset)

    def passes(x: NDArray[np.float32]) -> NDArray[np.bool_]:
        with np.errstate(over="ignore"):
            passed: NDArray[np.bool_] = np.rint((x - offset) / divisor) >= places
        return passed

    return last_failing_float(passes, (1, step.levels))


@write_quantized.register
def _(step: s.UniformCodes, writer: GraphWriter, annotations: dict[str, str]) -> Layout:
    return _multi_threshold(step, step.inputs[0], uniform_thresholds(step), step.levels, writer, annotations)


@write_quantized.register
def _(step: s.Codes, writer: GraphWriter, annotations: dict[str, str]) -> Layout:
    (x,) = step.inputs
    if step.sign is not None:
        layout = writer.layouts[x]
        if layout == "NHWC":
            x, layout = writer.in_layout(x, "NCHW"), "NCHW"
        x = writer.op("Mul", [x, writer.channelwise(step.sign.astype(np.float32), layout)])
    return _multi_threshold(step, x, step.thresholds, step.levels, writer, annotations)


def _multi_threshold(
    step: s.Step,
    x: str,
    thresholds: NDArray[Any],
    levels: int,
    writer: GraphWriter,
    annotations: dict[str, str],
) -> Layout:
    source = step.inputs[0]
    flat = writer.layouts[source] == "flat"
    if x == source:
        x = writer.in_layout(x, "NCHW")
    annotations[step.name] = f"UINT{levels.bit_length()}"
    writer.op(
        "MultiThreshold",
        [x, writer.const(at_least(thresholds))],
        step.name,
        domain=DOMAIN,
        out_dtype=annotations[step.name],
        out_scale=1.0,
        out_bias=0.0,
        data_layout="NC" if flat else "NCHW",
    )
    return "flat" if flat else "NCHW"


def _weight(step: s.IntConv, weight: NDArray[Any], writer: GraphWriter, notes: dict[str, str]) -> str:
    if needs_float64(step):
        raise ValueError(
            f"{step.name}: its sums can pass 2^24, which QONNX's float32 tensors do not hold exactly; "
            "use fewer bits, or the format onnx"
        )
    name = writer.const(weight.astype(np.float32))
    notes[name] = f"INT{step.bits + 1 if step.odd else step.bits}"
    return name


@write_quantized.register
def _(step: s.IntConv, writer: GraphWriter, annotations: dict[str, str]) -> Layout:
    x = writer.in_layout(step.inputs[0], "NCHW")
    weight = _weight(step, step.weight, writer, annotations)
    convolution(writer, x, weight, step.window, step.name, step.weight.shape[2:])
    return "NCHW"


@write_quantized.register
def _(step: s.IntLinear, writer: GraphWriter, annotations: dict[str, str]) -> Layout:
    writer.op("MatMul", [step.inputs[0], _weight(step, step.weight.T, writer, annotations)], step.name)
    return "flat"
