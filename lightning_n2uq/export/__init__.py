"""Deployment: trained networks as integer networks, in PyTorch, numpy, ONNX, QONNX and safetensors.

A trained network becomes one `Description` (`describe`), a list of plain steps. `ExactNetwork` executes it in
PyTorch, `run_numpy` in numpy; `save_onnx`, `save_qonnx` and `save_safetensors` write it. ONNX packages are
imported where they are used.
"""

from lightning_n2uq.export.command import main
from lightning_n2uq.export.formats.safetensors_file import load_safetensors, save_safetensors
from lightning_n2uq.export.ir.description import Description, FoldReport
from lightning_n2uq.export.lower.preprocessing import with_normalization
from lightning_n2uq.export.lower.trace import describe
from lightning_n2uq.export.runtime.numpy_engine import run_numpy
from lightning_n2uq.export.runtime.torch_engine import ExactNetwork


def __getattr__(name: str) -> object:
    """Writers that need the package onnx."""
    if name in ("save_onnx", "to_onnx"):
        from lightning_n2uq.export.formats import onnx_file

        return getattr(onnx_file, name)
    if name in ("save_qonnx", "to_qonnx"):
        from lightning_n2uq.export.formats import qonnx_file

        return getattr(qonnx_file, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Description",
    "ExactNetwork",
    "FoldReport",
    "describe",
    "load_safetensors",
    "main",
    "run_numpy",
    "save_safetensors",
    "with_normalization",
]
