"""`n2uq doctor`: which kernels run on this machine and why, versions, devices, threads, what is missing."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from lightning_n2uq._version import __version__
from lightning_n2uq.utils import extras

_NEEDED = ("torch", "torchvision", "lightning", "torchmetrics", "jsonargparse", "numpy")
_OPTIONAL = {
    "numba": "CPU kernels; without it quantizers and codec run in plain torch, many times slower",
    "triton": "CUDA kernels; comes with torch's CUDA builds on Linux",
    "wandb": "the default logger",
    "onnx": "export to ONNX and QONNX",
    "onnxruntime": "running exported networks",
    "sklearn": "the handwritten digits of the example",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report.

    Args:
        argv: The arguments behind `n2uq doctor`; `--check` runs every operator once on every device.

    Returns:
        0, or 1 if something that is needed is missing or a checked operator fails.
    """
    parser = argparse.ArgumentParser(prog="n2uq doctor", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="compare every operator with the reference (compiles kernels)"
    )
    chosen = parser.parse_args(None if argv is None else list(argv))
    missing = [name for name in _NEEDED if _version(name) is None]
    for title, lines in _sections(missing).items():
        _print(title, lines)
    passed, failed = _check() if chosen.check and not missing else ([], [])
    for title, lines in (("checked, forward and backward", passed), ("failed", failed)):
        if lines:
            _print(title, lines)
    return int(bool(missing or failed))


def _print(title: str, lines: list[str]) -> None:
    print(title)
    for line in lines:
        print(f"  {line}")


def _sections(missing: list[str]) -> dict[str, list[str]]:
    versions = [f"{name:<14} {_version(name)}" for name in _NEEDED if name not in missing]
    absent = [f"{name:<14} {why}" for name, why in _OPTIONAL.items() if _version(name) is None]
    present = [f"{name:<14} {_version(name)}" for name in _OPTIONAL if _version(name) is not None]
    header = f"lightning_n2uq {__version__}, Python {platform.python_version()} on {platform.system()}"
    sections = {header: versions + present}
    if "torch" not in missing:
        sections |= {"devices and threads": _devices(), "kernels": _kernels()}
    sections["extras"] = _extras()
    if missing:
        sections["missing, and needed"] = missing
    if absent:
        sections["missing, and optional"] = absent
    return sections


def _extras() -> list[str]:
    """Returns a line for every extra: complete, or what installs the rest."""
    names = extras.extras()
    if not names:
        return ["unknown: the package is not installed (pip install --editable . in its checkout)"]
    lines = []
    for name in names:
        lacking = extras.missing(name)
        told = f"{len(lacking)} missing: {extras.how_to_install(name)}" if lacking else "complete"
        lines.append(f"{name:<14} {told}")
    return lines


def _version(name: str) -> str | None:
    distribution = {"sklearn": "scikit-learn"}.get(name, name)
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    lines = [f"cpu            {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        lines.append(f"cuda:{index}         {torch.cuda.get_device_name(index)}, capability {major}.{minor}")
    if not torch.cuda.is_available():
        lines.append("cuda           none that torch can use")
    return lines


def _kernels() -> list[str]:
    from lightning_n2uq.ops import dispatch

    lines = [f"{c.op:<20} {c.device:<5} {c.kernel:<10} {c.reason}" for c in dispatch.report()]
    lines.append(_integers())
    if _version("numba") is not None:
        lines.append(f"compiled kernels are kept in {_cache_folder()}")
    lines.append(f"{dispatch.ENVIRONMENT_VARIABLE}={os.environ.get(dispatch.ENVIRONMENT_VARIABLE, 'auto')}")
    return lines


def _integers() -> str:
    """Returns which widths the integer convolutions of this machine add exactly."""
    import torch

    from lightning_n2uq.layers.integer import exact_widths

    widths = exact_widths(torch.device("cpu"))
    if not widths:
        return "training convolves floats on the cpu"
    pairs = ", ".join(f"{codes} x {levels}" for codes, levels in widths)
    return f"training convolves integers up to {pairs} bits (activations x weights)"


def _cache_folder() -> str:
    """Returns where numba keeps compiled kernels: beside the sources, or in the user's cache folder."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return chosen
    from lightning_n2uq.ops.backends import numba

    folder = Path(numba.__file__).parent
    return str(folder / "__pycache__") if os.access(folder, os.W_OK) else "the user's cache folder"


def _check() -> tuple[list[str], list[str]]:
    """Runs every operator on every device against the reference; returns what passed and what failed."""
    torch, checked = (
        importlib.import_module("torch"),
        importlib.import_module("lightning_n2uq.operator_check"),
    )
    passed, failed = [], []
    for name in checked.CHECKS:
        for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            try:
                checked.compare(name, device)
                passed.append(f"{name:<20} {device:<5} as the reference")
            except Exception as error:  # noqa: PERF203 -- whatever a compiler or driver raises belongs into the report
                failed.append(f"{name} on {device}: {type(error).__name__}: {error}")
    return passed, failed
