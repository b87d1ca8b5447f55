"""The four engines behind one face: images in, logits and every quantizer's codes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.steps import Input
from lightning_n2uq.export.runtime.numpy_engine import run_numpy
from lightning_n2uq.export.runtime.torch_engine import ExactNetwork

Tensor = NDArray[Any]


@dataclass(frozen=True)
class Outputs:
    """What a network answered.

    Attributes:
        logits: `[N, classes]` float32.
        codes: by quantizer, `[N, C, H, W]` or `[N, F]` uint8.
    """

    logits: Tensor
    codes: dict[str, Tensor]


Engine = Callable[[Tensor], Outputs]


def numpy_engine(description: Description) -> Engine:
    """The integer reference."""
    names = [step.name for step in description.quantizers()]

    def run(images: Tensor) -> Outputs:
        values = run_numpy(description, images)
        return Outputs(values[description.output], {name: values[name] for name in names})

    return run


def torch_engine(description: Description) -> Engine:
    """PyTorch's integer-exact evaluation."""
    network = ExactNetwork(description)
    names = [step.name for step in description.quantizers()]

    def run(images: Tensor) -> Outputs:
        values = network.run(torch.from_numpy(images))
        return Outputs(values[description.output].numpy(), {name: values[name].numpy() for name in names})

    return run


def onnxruntime_engine(description: Description, model: bytes | None = None, threads: int = 1) -> Engine:
    """Onnxruntime on the CPU.

    Args:
        description: the network.
        model: the file that gives the logits; written anew if None. The codes come from a copy with further
            outputs, since those keep the runtime from merging nodes.
        threads: of the runtime.

    Raises:
        ValueError: the installed onnxruntime cannot read the file.
    """
    from lightning_n2uq.export.formats.onnx_file import to_onnx, write_graph

    names = [step.name for step in description.quantizers()]
    opset = None if model is None else _opset(model)
    deployed = session(model or to_onnx(description).SerializeToString(), threads)
    copy = session(to_onnx(description, opset=opset, code_outputs=names).SerializeToString(), threads)
    layouts = write_graph(description, opset=opset).layouts

    def run(images: Tensor) -> Outputs:
        (logits,) = deployed.run(None, {description.input.name: images})
        values = copy.run(names, {description.input.name: images}) if names else []
        codes = dict(zip(names, values, strict=True))
        return Outputs(logits, {name: _channels_first(codes[name], layouts[name]) for name in names})

    return run


def session(model: bytes, threads: int = 1) -> Any:  # noqa: ANN401 -- onnxruntime is imported late
    """An onnxruntime session on the CPU that says nothing."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has its own classes, without a common one
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"engines: onnxruntime {onnxruntime.__version__} cannot read it ({reason})"
        ) from error


def _opset(model: bytes) -> int:
    """Of a file's standard operators."""
    import onnx

    imports = onnx.ModelProto.FromString(model).opset_import
    return next(entry.version for entry in imports if entry.domain in ("", "ai.onnx"))


def _channels_first(value: Tensor, layout: str) -> Tensor:
    return value.transpose(0, 3, 1, 2) if layout == "NHWC" else value


def qonnx_engine(description: Description, model: bytes | None = None) -> Engine:
    """The qonnx package's executor, node by node, after its own shape and datatype inference.

    Args:
        description: the network.
        model: the file to execute; written anew if None.
    """
    names = [step.name for step in description.quantizers()]

    def run(images: Tensor) -> Outputs:
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.core.onnx_exec import execute_onnx
        from qonnx.transformation.infer_datatypes import InferDataTypes
        from qonnx.transformation.infer_shapes import InferShapes

        wrapper = ModelWrapper(_with_batch(description, model, len(images)))
        wrapper = wrapper.transform(InferShapes()).transform(InferDataTypes())
        values = execute_onnx(wrapper, {description.input.name: images}, return_full_exec_context=True)
        codes = {name: values[name].astype(np.uint8) for name in names}
        return Outputs(values[description.output], codes)

    return run


def _with_batch(description: Description, model: bytes | None, batch: int) -> Any:  # noqa: ANN401
    """A QONNX model with a fixed batch size, which its executor wants."""
    import onnx

    from lightning_n2uq.export.formats.qonnx_file import to_qonnx

    if model is None:
        return to_qonnx(description, batch)
    proto = onnx.ModelProto.FromString(model)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return proto


def float_input(description: Description) -> Description:
    """The same network with integers in float32 tensors, as QONNX has them; for quantizers on their own."""
    first = description.input
    steps = (Input(first.name, (), first.shape), *description.steps[1:])
    return replace(description, steps=steps)


def chosen_engines(
    names: Sequence[str], description: Description, model: bytes | None = None, file_format: str = "onnx"
) -> dict[str, Engine]:
    """Engines by name, ready to run.

    Args:
        names: keys of `ENGINES`.
        description: the network.
        model: a file for the engine that reads its format.
        file_format: `onnx` or `qonnx`.

    Raises:
        ValueError: an unknown name, or fewer than two.
    """
    unknown = [name for name in names if name not in ENGINES]
    if unknown or len(set(names)) < 2:
        raise ValueError(f"engines: got {', '.join(names)}; allowed are two or more of {', '.join(ENGINES)}")
    reader = "onnxruntime" if file_format == "onnx" else file_format
    files = {reader: (model,)} if model is not None else {}
    return {name: ENGINES[name](description, *files.get(name, ())) for name in names}


ENGINES: dict[str, Callable[..., Engine]] = {
    "torch": torch_engine,
    "numpy": numpy_engine,
    "onnxruntime": onnxruntime_engine,
    "qonnx": qonnx_engine,
}
"""Engines by name; the first is what the others are compared with."""
