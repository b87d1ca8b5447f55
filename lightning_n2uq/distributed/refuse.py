"""Sharded training keeps no whole gradient on any rank: say so before something else breaks."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

_ADVICE = "use DistributedDataParallel (`nuqsgd` strategies) or drop the hook"


def refuse_sharded(module: nn.Module) -> None:
    """Raise if gradients of the module are sharded or exchanged by somebody else.

    Raises:
        ValueError: For FSDP, ``fully_shard`` and DeepSpeed modules.
    """
    kind = type(module).__name__
    if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        kind = "FullyShardedDataParallel"
    elif any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        kind = "a module with DTensor parameters"
    elif not any(base.__name__ == "DeepSpeedEngine" for base in type(module).__mro__):
        return
    raise ValueError(f"`module` must not be sharded, got {kind}: {_ADVICE}")


def refuse_bucket(bucket: object) -> ValueError:
    """Return the error for something that is not a DDP bucket (FSDP hands hooks plain tensors)."""
    return ValueError(
        f"`bucket` must be a GradBucket of DistributedDataParallel, got {type(bucket).__name__}: {_ADVICE}"
    )
