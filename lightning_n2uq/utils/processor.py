"""What this machine's processor can do, as far as arithmetic on bytes depends on it."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")
_DOT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16"})


@functools.cache
def flags() -> frozenset[str]:
    """Returns the processor's flags as Linux names them; none on other systems."""
    try:
        text = _CPUINFO.read_text()
    except OSError:
        return frozenset()
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    return frozenset(lines[0].partition(":")[2].split()) if lines else frozenset()


def has_vectors() -> bool:
    """Returns whether this is an x86 processor whose AVX2 or AVX-512 torch uses."""
    return platform.machine().lower() in ("x86_64", "amd64") and torch.backends.cpu.get_cpu_capability() in (
        "AVX2",
        "AVX512",
    )


def adds_bytes_exactly() -> bool:
    """Returns whether products of bytes are added up in 32 bits at once (VNNI, AMX), not in 16 in between.

    Where the user holds oneDNN back from some instructions, no more is taken for granted.
    """
    limited = any(os.environ.get(name, "ALL").upper() not in ("", "ALL", "DEFAULT") for name in _LIMITS)
    return bool(flags() & _DOT_PRODUCTS) and not limited


def writes_bfloat16() -> bool:
    """Returns whether the processor rounds to bfloat16 itself."""
    return bool(flags() & _BFLOAT16)
