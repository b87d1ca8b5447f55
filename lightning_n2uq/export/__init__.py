"""Deployment: trained networks as integer networks, in PyTorch, numpy, ONNX, QONNX, pt2 and safetensors.

A trained network becomes one `Description` (`describe`), a list of plain steps. `ExactNetwork` executes it in
PyTorch, `FastNetwork` with integer kernels on the CPU, `run_numpy` in numpy; `save_onnx`, `save_qonnx`,
`save_pt2` and `save_safetensors` write it. Folders: `ir` (what a deployed network is), `lower` (how a trained
one becomes it), `formats`, `runtime`, `verify`; `program`, which writes any other network with torch's
exporter. torch and onnx are imported at first use: files are read and run in numpy without either.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from lightning_n2uq.export.command import main
from lightning_n2uq.export.formats.safetensors_file import load_safetensors, save_safetensors
from lightning_n2uq.export.ir.description import Description, FoldReport
from lightning_n2uq.export.lower.preprocessing import with_normalization
from lightning_n2uq.export.runtime.numpy_engine import run_numpy

if TYPE_CHECKING:
    from lightning_n2uq.export.formats.onnx_file import save_onnx, to_onnx
    from lightning_n2uq.export.formats.pt2_file import load_pt2, save_pt2
    from lightning_n2uq.export.formats.qonnx_file import save_qonnx, to_qonnx
    from lightning_n2uq.export.lower.trace import describe
    from lightning_n2uq.export.program.explain import explain_file, explain_modules
    from lightning_n2uq.export.program.onnx_program import export_program
    from lightning_n2uq.export.runtime.fast_engine import FastNetwork
    from lightning_n2uq.export.runtime.torch_engine import ExactNetwork

_WHERE = {
    "ExactNetwork": "runtime.torch_engine",
    "FastNetwork": "runtime.fast_engine",
    "describe": "lower.trace",
    "explain_file": "program.explain",
    "explain_modules": "program.explain",
    "export_program": "program.onnx_program",
    "load_pt2": "formats.pt2_file",
    "save_onnx": "formats.onnx_file",
    "save_pt2": "formats.pt2_file",
    "save_qonnx": "formats.qonnx_file",
    "to_onnx": "formats.onnx_file",
    "to_qonnx": "formats.qonnx_file",
}


def __getattr__(name: str) -> object:
    """Imports what needs torch or onnx."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


__all__ = [
    "Description",
    "ExactNetwork",
    "FastNetwork",
    "FoldReport",
    "describe",
    "explain_file",
    "explain_modules",
    "export_program",
    "load_pt2",
    "load_safetensors",
    "main",
    "run_numpy",
    "save_onnx",
    "save_pt2",
    "save_qonnx",
    "save_safetensors",
    "to_onnx",
    "to_qonnx",
    "with_normalization",
]
