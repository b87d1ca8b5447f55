"""The engines behind one interface: images in, logits and every quantizer's codes out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.integer_steps import GridCodes
from lightning_n2uq.export.ir.steps import Array
from lightning_n2uq.export.runtime.numpy_engine import run_numpy


@dataclass(frozen=True)
class Outputs:
    """What a network answered.

    Attributes:
        logits: Logits `[N, classes]`, float32.
        codes: Codes by quantizer, `[N, C, H, W]` or `[N, F]` uint8.
    """

    logits: Array
    codes: dict[str, Array]


InferenceEngine = Callable[[Array], Outputs]


def outputs_of(description: Description, values: Mapping[str, Array]) -> Outputs:
    """Picks logits and codes out of the values by step name."""
    codes = {step.name: values[step.name] for step in description.quantizers()}
    return Outputs(values[description.output], codes)


def numpy_engine(description: Description) -> InferenceEngine:
    """Returns the integer reference."""
    return lambda images: outputs_of(description, run_numpy(description, images))


def torch_engine(description: Description) -> InferenceEngine:
    """Returns PyTorch's integer-exact evaluation."""
    import torch

    from lightning_n2uq.export.runtime.torch_engine import ExactNetwork

    network = ExactNetwork(description)

    def run(images: Array) -> Outputs:
        values = network.run(torch.from_numpy(images))
        return outputs_of(description, {name: value.numpy() for name, value in values.items()})

    return run


def fast_engine(description: Description) -> InferenceEngine:
    """Returns the fast engine on the CPU."""
    import torch

    from lightning_n2uq.export.runtime.fast_engine import FastNetwork

    network = FastNetwork(description)

    def run(images: Array) -> Outputs:
        values = network.run(torch.from_numpy(images))
        return outputs_of(description, {name: value.numpy() for name, value in values.items()})

    return run


def session(model: bytes, threads: int = 1) -> Any:  # noqa: ANN401 -- onnxruntime is imported late
    """Opens an onnxruntime session on the CPU that says nothing.

    Raises:
        ValueError: The installed onnxruntime cannot read the model.
    """
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


def onnxruntime_engine(
    description: Description, model: bytes | None = None, threads: int = 1
) -> InferenceEngine:
    """Returns onnxruntime on the CPU.

    Args:
        description: The network to execute.
        model: The file that gives the logits; written anew if None. The codes come from a copy with further
            outputs, since those keep the runtime from merging nodes.
        threads: Number of the runtime's threads.

    Raises:
        ValueError: The installed onnxruntime cannot read the file.
    """
    from lightning_n2uq.export.formats.onnx_file import opset_of, to_onnx, write_graph

    names = [step.name for step in description.quantizers()]
    opset = None if model is None else opset_of(model)
    deployed = session(model or to_onnx(description).SerializeToString(), threads)
    copy = session(to_onnx(description, opset=opset, code_outputs=names).SerializeToString(), threads)
    layouts = write_graph(description, opset=opset).layouts

    def run(images: Array) -> Outputs:
        (logits,) = deployed.run(None, {description.input.name: images})
        values = copy.run(names, {description.input.name: images}) if names else []
        codes = {
            name: value.transpose(0, 3, 1, 2) if layouts[name] == "NHWC" else value
            for name, value in zip(names, values, strict=True)
        }
        for step in description.quantizers():
            if isinstance(step, GridCodes):  # the file holds the index of the value
                codes[step.name] = (codes[step.name] + np.int16(step.low)).astype(step.dtype)
        return Outputs(logits, codes)

    return run


def qonnx_engine(description: Description, model: bytes | None = None) -> InferenceEngine:
    """Returns the qonnx package's executor, node by node, after its own shape and datatype inference.

    Args:
        description: The network to execute.
        model: The file to execute; written anew if None.
    """

    def run(images: Array) -> Outputs:
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.core.onnx_exec import execute_onnx
        from qonnx.transformation.infer_datatypes import InferDataTypes
        from qonnx.transformation.infer_shapes import InferShapes

        from lightning_n2uq.export.formats.qonnx_file import pixels_are_integers, with_batch

        wrapper = ModelWrapper(with_batch(description, model, len(images)))
        wrapper = wrapper.transform(InferShapes()).transform(InferDataTypes())
        pixels = images.astype("float32") if pixels_are_integers(description) else images
        values = execute_onnx(wrapper, {description.input.name: pixels}, return_full_exec_context=True)
        for step in description.quantizers():
            values[step.name] = values[step.name].astype(getattr(step, "dtype", "uint8"))
        return outputs_of(description, values)

    return run


def pt2_engine(description: Description, path: str | Path | None = None) -> InferenceEngine:
    """Returns the compiled network.

    Args:
        description: The network to execute.
        path: The file that gives the logits; compiled anew if None. The codes come from a copy with further
            outputs, which takes as long to compile.
    """
    import torch

    from lightning_n2uq.export.formats.pt2_file import load_pt2, save_pt2

    with tempfile.TemporaryDirectory() as folder:
        copy_path = Path(folder) / "codes.pt2"
        save_pt2(description, copy_path, code_outputs=True)
        copy = load_pt2(copy_path)
    deployed = copy if path is None else load_pt2(path)
    names = [step.name for step in description.quantizers()]

    def run(images: Array) -> Outputs:
        tensor = torch.from_numpy(images)
        _, *codes = copy.run(tensor)
        values = {name: value.numpy() for name, value in zip(names, codes, strict=True)}
        return Outputs(deployed(tensor).numpy(), values)

    return run


ENGINES: dict[str, Callable[..., InferenceEngine]] = {
    "torch": torch_engine,
    "fast": fast_engine,
    "numpy": numpy_engine,
    "onnxruntime": onnxruntime_engine,
    "qonnx": qonnx_engine,
    "pt2": pt2_engine,
}
"""Engines by name; the first is what the others are compared with."""


def chosen_engines(
    names: Sequence[str],
    description: Description,
    model: bytes | Path | None = None,
    file_format: str = "onnx",
) -> dict[str, InferenceEngine]:
    """Returns engines by name, ready to run.

    Args:
        names: Keys of `ENGINES`.
        description: The network to execute.
        model: A file for the engine that reads its format: its content, or for `pt2` its path.
        file_format: Format of the file, `onnx`, `qonnx` or `pt2`.

    Raises:
        ValueError: A name is unknown, or there are fewer than two.
    """
    unknown = [name for name in names if name not in ENGINES]
    if unknown or len(set(names)) < 2:
        raise ValueError(f"engines: got {', '.join(names)}; allowed are two or more of {', '.join(ENGINES)}")
    reader = "onnxruntime" if file_format == "onnx" else file_format
    files = {reader: (model,)} if model is not None else {}
    return {name: ENGINES[name](description, *files.get(name, ())) for name in names}
