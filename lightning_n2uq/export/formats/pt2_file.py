"""pt2 files: the network compiled to machine code by AOTInductor, for Python and for C++ without Python.

The package holds a shared library with the weights, which takes images in any batch size and returns logits.
It runs on processors with the instructions of the one that wrote it (AVX2, AVX-512), with the same torch.
A C++ compiler is needed when it is written, not when it runs. Its bits are those of every other format.
"""

from __future__ import annotations

import io
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.runtime.integer_network import IntegerNetwork
from lightning_n2uq.utils.atomic import replacing
from lightning_n2uq.utils.compat import compile_package, load_package, trace_packed_weights

LARGEST_BATCH = 2**16
_SETTINGS: dict[str, Any] = {
    "freezing": True,  # packs the weights
    "unroll_reductions_threshold": 64,  # a quantizer's comparisons stay in one loop with what surrounds them
    "cpp.dynamic_threads": True,  # else the number of threads would be that of the exporting process
}


def compiler() -> str:
    """Returns the C++ compiler that the export calls.

    Raises:
        ValueError: There is none.
    """
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise ValueError(
            f"format: pt2 needs a C++ compiler, and {name!r} is not installed; install it or name one in CXX"
        )
    return name


def save_pt2(description: Description, path: str | Path, code_outputs: bool = False) -> None:
    """Compiles the network, which takes a minute or more, and writes it to a file.

    Args:
        description: The network to write.
        path: The file, whose name ends in `.pt2`.
        code_outputs: Whether the codes of every quantizer follow the logits, for comparison.

    Raises:
        ValueError: There is no C++ compiler, or the name ends otherwise.
    """
    check_name(path)
    compiler()
    trace_packed_weights()
    network = IntegerNetwork(description, code_outputs).eval()
    images = torch.zeros(2, *description.input.shape, dtype=getattr(torch, description.input.dtype))
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    package = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, which say nothing about the network
        program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},), strict=False)
        compile_package(program, package, {**_SETTINGS, "aot_inductor.metadata": dict(description.metadata)})
    with replacing(path) as partial:
        partial.write_bytes(package.getvalue())


def check_name(path: str | Path) -> None:
    """Raises `ValueError` unless the loaders would take a file of this name."""
    if Path(path).suffix != ".pt2":
        raise ValueError(f"output: got {str(path)!r}, allowed is a name that ends in .pt2")


class CompiledNetwork:
    """A package, loaded.

    Args:
        path: A file that `save_pt2` wrote.

    Attributes:
        metadata: Texts by key, as the description had them, and torch's own.

    Raises:
        ValueError: The file is no package that the installed torch can load.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self._package = load_package(str(path))
        except (RuntimeError, OSError, AssertionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"path: cannot load {str(path)!r} as a pt2 package ({reason})") from error
        self.metadata: dict[str, str] = self._package.get_metadata()

    def __call__(self, images: Tensor) -> Tensor:
        """Returns the logits `[N, classes]` of images `[N, C, H, W]`."""
        return self.run(images)[0]

    def run(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns everything that the network was compiled to give, the logits first."""
        with torch.no_grad():
            outputs: tuple[Tensor, ...] = self._package(images.contiguous())
        return outputs


def load_pt2(path: str | Path) -> CompiledNetwork:
    """Loads a network that `save_pt2` wrote."""
    return CompiledNetwork(path)
