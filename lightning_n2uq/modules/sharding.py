"""Shards a module's network where the strategy has a device mesh (`nuqsgd_fsdp`, `ModelParallelStrategy`)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

SMALLEST_UNIT = 1 << 16
"""Blocks with fewer parameters are gathered with the rest of the network: a collective is not free."""


class ShardedByStrategy(LightningModule):
    """A LightningModule whose network is sharded in `configure_model`, as strategies with a mesh ask for.

    Attributes:
        sharded: The name of the network.
    """

    sharded: ClassVar[str]

    def configure_model(self) -> None:
        """Applies `fully_shard` to the network and its blocks; without a device mesh, does nothing."""
        mesh = self.device_mesh
        if mesh is not None:
            policy = getattr(self.trainer.strategy, "mp_policy", None)
            shard(getattr(self, self.sharded), mesh["data_parallel"], policy)


def shard(network: nn.Module, mesh: DeviceMesh, policy: Any = None) -> None:  # noqa: ANN401 -- slow to import
    """Shards a network over a mesh, block by block; one that is sharded already stays as it is.

    Args:
        network: The network; its parameters have to be contiguous.
        mesh: The ranks to shard over.
        policy: The `MixedPrecisionPolicy`; None computes and reduces in the parameters' dtype.

    Raises:
        ValueError: If a parameter has a memory format that FSDP2 does not take.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if isinstance(network, FSDPModule):
        return
    for name, parameter in network.named_parameters():
        if not parameter.is_contiguous():
            raise ValueError(
                f"memory_format: got {name} in channels_last, allowed is contiguous in sharded training"
            )
    if type(network).__module__.partition(".")[0] == "lightning_n2uq":
        # Its blocks return views of memory of their own, which nothing writes to.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    policy = MixedPrecisionPolicy() if policy is None else policy
    for block in blocks(network):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    outermost = policy if policy.param_dtype is None else replace(policy, output_dtype=torch.float32)
    fully_shard(network, mesh=mesh, mp_policy=outermost)


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yields the blocks of a network: members of its outermost lists and sequences, if they are large."""
    for child in network.children():
        member = isinstance(network, nn.ModuleList | nn.Sequential)
        if not member or isinstance(child, nn.ModuleList | nn.Sequential):
            yield from blocks(child)
        elif sum(parameter.numel() for parameter in child.parameters()) >= SMALLEST_UNIT:
            yield child
