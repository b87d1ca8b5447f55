"""The implementations behind the custom operators: plain torch, CPU (numba), CUDA (Triton).

The same file names in `reference`, `numba` and `triton`; what two of them share is in `common`. Modules are
imported at first use only.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from lightning_n2uq.ops.dispatch import kernel_for

_MODULES = {
    "threshold_quantize": "threshold",
    "quantize_weight": "weight",
    "packed_activation": "fused_activation",
    "residual_block": "residual",
    "stem": "stem",
    "nuq": "gradient_codec",
}


def load(op: str, device: torch.device) -> ModuleType | None:
    """The module that runs `op` on `device`; None means the oracle in plain torch."""
    kernel = kernel_for(op, device)
    if kernel == "reference":
        return None
    return importlib.import_module(f"{__name__}.{kernel}.{_MODULES[op]}")
