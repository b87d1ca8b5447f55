"""What a figure was measured on, and with which releases."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from lightning_n2uq.utils import processor

PACKAGES = ("torch", "torchvision", "lightning", "numba", "triton", "brevitas", "torchao", "numpy")

INSTRUCTIONS = frozenset({"avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8"})
"""What makes arithmetic on bytes fast, as Linux names it."""


def description(device: torch.device) -> dict[str, object]:
    """Processor, cores, load, threads, device and versions; nothing that names the machine."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "processor": _processor(),
        "integer_instructions": sorted(processor.flags() & INSTRUCTIONS),
        "cores": os.cpu_count(),
        "load_before": load,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    """Returns the installed release of a package, None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
