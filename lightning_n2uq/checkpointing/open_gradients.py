"""Gradients that wait for the rest of their step, in checkpoints written between accumulated batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_n2uq.utils.shards import is_sharded

_SHARDED = (
    "a checkpoint written between accumulated batches does not keep the gradients of a sharded network: a "
    "run that goes on from it repeats the step without them"
)


def capture(module: LightningModule) -> dict[str, Tensor]:
    """Returns this rank's gradients by the name of their parameter, on the CPU.

    Those of a sharded network are left out with a warning: FSDP2 has them in a place of its own.

    Args:
        module: What is trained.
    """
    if is_sharded(module):
        rank_zero_warn(_SHARDED)
        return {}
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: gradient.detach().cpu() for name, gradient in found.items()}


def restore(module: LightningModule, gradients: Mapping[str, Tensor]) -> None:
    """Puts gradients back where they were.

    Args:
        module: What is trained; parameters without an entry keep what they have.
        gradients: What `capture` returned.
    """
    for name, parameter in module.named_parameters():
        if name in gradients:
            with torch.no_grad():
                parameter.grad = gradients[name].to(parameter.device)
