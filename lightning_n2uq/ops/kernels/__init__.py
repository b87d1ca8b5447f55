"""CPU (numba) and CUDA (Triton) kernels behind the custom operators; imported at first use only."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from lightning_n2uq.ops.dispatch import kernel_for

_SUFFIX = {"numba": "cpu", "triton": "cuda"}
_PREFIX = {
    "threshold_quantize": "threshold",
    "quantize_weight": "weight",
    "packed_activation": "packed",
    "residual_block": "block",
    "stem": "block",
    "nuq": "nuq",
}


def load(op: str, device: torch.device) -> ModuleType | None:
    """The kernel module that runs `op` on `device`; None means the oracle in plain torch."""
    kernel = kernel_for(op, device)
    if kernel == "reference":
        return None
    return importlib.import_module(f"{__name__}.{_PREFIX[op]}_{_SUFFIX[kernel]}")
