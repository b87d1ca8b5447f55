"""ONNX files with standard operators only, for onnxruntime and integer runtimes."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnx
from onnx import TensorProto

from lightning_n2uq.export.formats.onnx_graph import GraphWriter, save_model
from lightning_n2uq.export.formats.onnx_integer import write_step
from lightning_n2uq.export.ir.description import Description, with_output_named

OPSETS = (21, 25)
"""21 has 4-bit types; 25 has 2-bit types too."""

_RUNTIME_OF_25 = (1, 24)  # the first onnxruntime that reads opset 25


def newest_opset() -> int:
    """Returns the newest of `OPSETS` that the installed onnx writes and onnxruntime, if installed, reads."""
    try:
        runtime = tuple(int(part) for part in version("onnxruntime").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        runtime = _RUNTIME_OF_25
    return OPSETS[1] if _writes(OPSETS[1]) and runtime >= _RUNTIME_OF_25 else OPSETS[0]


def _writes(opset: int) -> bool:
    return opset <= onnx.defs.onnx_opset_version() and (opset < 25 or hasattr(TensorProto, "UINT2"))


def to_onnx(
    description: Description,
    convolution: str = "matmul",
    opset: int | None = None,
    code_outputs: Iterable[str] = (),
) -> onnx.ModelProto:
    """Returns the network as an ONNX model with a dynamic batch size.

    Args:
        description: The network to write.
        convolution: How integer convolutions are written: `matmul`, as `MatMulInteger` over gathered
            windows, or `conv`, as `ConvInteger`.
        opset: Version of the operators: 21, or 25, which stores 2-bit weights in 2 bits instead of 4; None
            is `newest_opset`.
        code_outputs: Quantizers whose codes are further outputs, for comparison; `NHWC` or `NCHW`, as
            they lie in the graph.

    Raises:
        ValueError: An argument is out of range, or the installed onnx does not know the opset.
    """
    writer = write_graph(description, convolution, opset)
    names = dict.fromkeys((description.output, *code_outputs))
    integer = {step.name for step in description.quantizers()}
    outputs = {name: TensorProto.UINT8 if name in integer else TensorProto.FLOAT for name in names}
    model = writer.file(outputs, {"": writer.opset})
    onnx.checker.check_model(model)
    return model


def write_graph(
    description: Description, convolution: str = "matmul", opset: int | None = None
) -> GraphWriter:
    """Writes all nodes of `to_onnx`'s model; arguments and errors as there."""
    opset = newest_opset() if opset is None else opset
    if opset not in OPSETS:
        raise ValueError(f"opset: got {opset}, allowed are {', '.join(map(str, OPSETS))}")
    _check_onnx(opset)
    if convolution not in ("matmul", "conv"):
        raise ValueError(f"convolution: got {convolution!r}, allowed are matmul, conv")
    writer = GraphWriter(description, "NHWC" if convolution == "matmul" else "NCHW", opset)
    for step in description.steps:
        writer.layouts[step.name] = write_step(step, writer)
    return writer


def _check_onnx(opset: int) -> None:
    """Raises one line, not an error from deep inside, where the installed onnx is older than the opset."""
    if _writes(opset):
        return
    newest = onnx.defs.onnx_opset_version()
    advice = f", or --opset {OPSETS[0]}, which stores 2-bit weights in 4 bits" if opset > OPSETS[0] else ""
    raise ValueError(
        f"opset: got {opset}, but the installed onnx {onnx.__version__} knows up to {newest}; "
        f"pip install -U onnx{advice}"
    )


def opset_of(model: bytes) -> int:
    """Returns the version of a file's standard operators."""
    imports = onnx.ModelProto.FromString(model).opset_import
    return next(entry.version for entry in imports if entry.domain in ("", "ai.onnx"))


def save_onnx(
    description: Description, path: str | Path, convolution: str = "matmul", opset: int | None = None
) -> None:
    """Writes `to_onnx`'s model to a file."""
    save_model(to_onnx(with_output_named(description), convolution, opset), path)
