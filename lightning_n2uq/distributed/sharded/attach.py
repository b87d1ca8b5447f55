"""Puts compressed collectives into the parts of a model that `fully_shard` has sharded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def sharded_parts(module: nn.Module) -> list[Any]:
    """Returns the parts of a model to which `fully_shard` was applied, outermost first."""
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def require_shards(module: nn.Module, replicas: Sequence[int] | None) -> list[Any]:
    """Returns the sharded parts, once they are known to be sharded over the right ranks.

    Raises:
        ValueError: If no part is sharded, or FSDP2 itself averages over replicas, or the ranks of the
            replicas are not those outside of the mesh.
    """
    parts = sharded_parts(module)
    if not parts:
        raise ValueError(
            f"module: got {type(module).__name__} without a sharded part, allowed is a model after "
            "fully_shard (in a LightningModule, apply it in configure_model)"
        )
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        mesh, placements = parameter.device_mesh, parameter.placements
        if mesh.ndim > 1 and placements[0].is_replicate():
            raise ValueError(
                f"module: got {name} on a mesh with replicas, which FSDP2 averages in full precision; "
                "allowed is the mesh of the shards alone, with the replicas' ranks handed to attach"
            )
        if replicas is not None and len(replicas) * mesh.size() != dist.get_world_size():
            raise ValueError(
                f"replicas: got {len(replicas)} for shards over {mesh.size()} ranks, allowed is "
                f"{dist.get_world_size() // mesh.size()} with {dist.get_world_size()} ranks"
            )
        break
    return parts


def install(
    parts: Sequence[Any],
    reduce_scatter: Any,  # noqa: ANN401 -- torch's class is private
    all_gather: Any,  # noqa: ANN401
    all_reduce: Callable[[Tensor], None] | None,
    needs_gather: bool,
) -> None:
    """Hands the collectives to FSDP2.

    Torch 2.8 takes the all-reduce alone; the others are there from torch 2.9 on.

    Args:
        parts: The sharded parts.
        reduce_scatter: Averages gradients into shards.
        all_gather: Gathers parameters.
        all_reduce: Averages shards between replicas; None without replicas.
        needs_gather: Whether parameters are to be compressed.

    Raises:
        ValueError: If the installed torch cannot take what is needed.
    """
    takes_all = hasattr(parts[0], "set_custom_reduce_scatter")
    if not takes_all and (all_reduce is None or needs_gather):
        raise ValueError(
            f"torch: got {torch.__version__}, allowed is 2.9 or newer for compressed collectives of FSDP2 "
            "(2.8 for hsdp with parameters in full precision)"
        )
    for part in parts:
        if takes_all:
            part.set_custom_reduce_scatter(reduce_scatter)
            part.set_custom_all_gather(all_gather)
        if all_reduce is not None:
            part.set_all_reduce_hook(all_reduce)


@torch.no_grad()
def copy_to_replicas(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Gives all replicas the parameters and buffers of the first. A collective call of the group."""
    source = dist.get_process_group_ranks(group)[0]
    for tensor in (*module.parameters(), *module.buffers()):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.numel():
            whole = local.contiguous()
            dist.broadcast(whole, source, group=group)
            local.copy_(whole)
