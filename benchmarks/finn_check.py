"""What FINN's compiler accepts of exported QONNX files: streamlining and the conversion to hardware layers.

    python benchmarks/finn_check.py net.qonnx.onnx --finn PATH/finn/src --qonnx PATH/qonnx/src

It runs in FINN's own Python environment (docs/deployment.md names the packages), not in this project's, and
needs no other file of it, no board and no vendor tools. The passes are FINN's; the order is that of its flows
for residual networks. After each stage the graph is executed on one random image and compared with the file,
at the end with FINN's layers in place of the nodes. The tables are printed as Markdown.
"""

from __future__ import annotations

import argparse
import sys
import types
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {
    "thresholds": (("MultiThreshold",), ("Thresholding",)),
    "convolutions and linear layers": (("Conv", "MatMul", "Gemm"), ("MVAU", "VVAU")),
    "residual sums": (("Add",), ("AddStreams",)),
    "pooling": (("GlobalAveragePool", "MaxPool"), ("GlobalAccPool", "StreamingMaxPool", "Pool")),
}
"""Layers by kind: operators in the file, and FINN's layers that they should become."""


class _Stub(types.ModuleType):
    """A module that FINN imports for its simulations and that the conversion does not use."""

    __path__: list[str] = []  # noqa: RUF012 -- what makes a module a package

    def __getattr__(self, name: str) -> Any:
        return object


def prepare(finn: Path, qonnx: Path | None) -> None:
    """Makes FINN and qonnx importable.

    Args:
        finn: The folder that holds the package `finn`.
        qonnx: The same for `qonnx`, in the revision that FINN's `fetch-repos.sh` names; None takes the
            installed one.
    """
    sys.path[:0] = [str(path) for path in (finn, qonnx) if path is not None]
    for name in ("pyverilator", "pyverilator.util", "pyverilator.util.axi_utils"):
        sys.modules.setdefault(name, _Stub(name))
    warnings.simplefilter("ignore")


def stages() -> dict[str, list[Any]]:
    """Returns FINN's passes by stage, in order."""
    from finn.transformation.fpgadataflow import convert_to_hw_layers as hw
    from finn.transformation.move_reshape import RemoveCNVtoFCFlatten
    from finn.transformation.streamline import Streamline, absorb, reorder, round_thresholds
    from qonnx.transformation.lower_convs_to_matmul import LowerConvsToMatMul

    transposes = [
        reorder.MoveTransposePastFork(),
        absorb.AbsorbTransposeIntoMultiThreshold(),
        reorder.MoveTransposePastJoinAdd(),
        absorb.AbsorbConsecutiveTransposes(),
    ]
    pooling = [
        hw.InferGlobalAccPoolLayer(),
        reorder.MoveScalarLinearPastInvariants(),
        absorb.AbsorbMulIntoMultiThreshold(),
        absorb.AbsorbTransposeIntoFlatten(),
        round_thresholds.RoundAndClipThresholds(),
    ]
    layers = [
        hw.InferAddStreamsLayer(),
        hw.InferDuplicateStreamsLayer(),
        hw.InferChannelwiseLinearLayer(),
        hw.InferPool(),
        hw.InferStreamingMaxPool(),
        hw.InferThresholdingLayer(),
        hw.InferQuantizedMatrixVectorActivation(),
        hw.InferConvInpGen(),
        absorb.AbsorbConsecutiveTransposes(),
        RemoveCNVtoFCFlatten(),
    ]
    return {
        "streamlining": [Streamline()],
        "convolutions as matrix products": [LowerConvsToMatMul(), *transposes * 6],
        "pooling as accumulation": pooling,
        "hardware layers": layers,
    }


def tidy(model: Any) -> Any:
    """Infers shapes, datatypes and layouts anew, as FINN does between its passes."""
    from qonnx.transformation import general
    from qonnx.transformation.fold_constants import FoldConstants
    from qonnx.transformation.infer_data_layouts import InferDataLayouts
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.transformation.infer_shapes import InferShapes

    for change in (
        InferShapes(),
        FoldConstants(),
        general.GiveUniqueNodeNames(),
        general.GiveReadableTensorNames(),
        InferDataTypes(),
        InferDataLayouts(),
    ):
        model = model.transform(change)
    return model


def image(model: Any) -> np.ndarray:
    """Returns a random image: integers where the network reads pixels, else normalized numbers."""
    name, rng = model.graph.input[0].name, np.random.default_rng(0)
    shape = model.get_tensor_shape(name)
    if model.get_tensor_datatype(name).is_integer():
        return rng.integers(0, 256, shape).astype(np.float32)
    return rng.standard_normal(shape).astype(np.float32)


def run(model: Any, pixels: np.ndarray) -> np.ndarray:
    """Returns the logits of one image."""
    from qonnx.core.onnx_exec import execute_onnx

    (logits,) = execute_onnx(model, {model.graph.input[0].name: pixels}).values()
    return np.asarray(logits)


def is_layer(model: Any, node: Any) -> bool:
    """Returns whether a node counts as a layer: an `Add` does if it adds two maps."""
    return node.op_type != "Add" or all(model.get_initializer(name) is None for name in node.input)


def count(model: Any) -> Counter[str]:
    """Returns the number of layers by operator."""
    return Counter(node.op_type for node in model.graph.node if is_layer(model, node))


def check(path: str) -> None:
    """Runs all stages on one file and prints what became of its layers."""
    from qonnx.core.modelwrapper import ModelWrapper

    model = tidy(ModelWrapper(path))
    before = count(model)
    pixels = image(model)
    expected = run(model, pixels)
    print(f"\n{path}\n")
    for stage, passes in stages().items():
        for change in passes:
            model = transformed(model, change, stage)
        print(f"- {stage}: {difference(model, pixels, expected)}")
    report(model, before)


def transformed(model: Any, change: Any, stage: str) -> Any:
    """Returns the model after one pass; a pass that stops is named, and leaves the model as it was."""
    try:
        return tidy(model.transform(change))
    except (AssertionError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        print(f"- {stage}: {type(change).__name__} stops: {type(error).__name__} {reason}")
        return model


def difference(model: Any, pixels: np.ndarray, expected: np.ndarray) -> str:
    """Returns how far the logits are from those of the file, as text."""
    try:
        return f"logits differ by {np.abs(run(model, pixels) - expected).max():g} at most"
    except Exception as error:  # whatever a half-converted graph raises
        return f"cannot be executed ({type(error).__name__})"


def report(model: Any, before: Counter[str]) -> None:
    """Prints layers accepted of all, by kind, and what stays outside of the hardware."""
    after = count(model)
    print("\n| layers | accepted | all |\n|---|---|---|")
    for kind, (operators, layers) in KINDS.items():
        accepted, total = (
            sum(found[name] for name in names) for found, names in ((after, layers), (before, operators))
        )
        print(f"| {kind} | {accepted} | {total} |")
    outside = [node for node in model.graph.node if not node.domain.startswith("finn.")]
    left = Counter(f"{node.op_type} of {model.get_tensor_datatype(node.input[0]).name}" for node in outside)
    print("\nnot FINN's: " + (", ".join(f"{number} {name}" for name, number in left.items()) or "none"))


def main() -> None:
    """Checks every file of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", help="files that `n2uq export --format qonnx --batch 1` wrote")
    parser.add_argument("--finn", type=Path, required=True, help="FINN's folder src")
    parser.add_argument("--qonnx", type=Path, help="qonnx's folder src, in FINN's revision")
    options = parser.parse_args()
    prepare(options.finn, options.qonnx)
    for path in options.files:
        check(path)


if __name__ == "__main__":
    main()
