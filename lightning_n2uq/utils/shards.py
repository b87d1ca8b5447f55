"""Whether a module is in shards; nothing here imports torch's `DTensor`."""

from __future__ import annotations

import sys

from torch import nn


def is_sharded(module: nn.Module) -> bool:
    """Returns whether FSDP2 or tensor parallelism has made `DTensor`s of some of the module's parameters."""
    tensors = sys.modules.get("torch.distributed.tensor")  # without it there is none
    return tensors is not None and any(isinstance(p, tensors.DTensor) for p in module.parameters())
