"""The process groups of an exchange: who talks to whom, flat or by node."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import cast

import torch.distributed as dist

from lightning_n2uq.distributed.collectives import Wire
from lightning_n2uq.distributed.config import ExchangeConfig


def node_size(config: ExchangeConfig, world_size: int) -> int:
    """Return how many ranks share a node; 1 without ``hierarchical``.

    Raises:
        ValueError: If nodes would differ in size.
    """
    if not config.hierarchical:
        return 1
    size = config.ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if size < 1:
        raise ValueError("`ranks_per_node` must be given when LOCAL_WORLD_SIZE is not set, got None")
    if world_size % size:
        raise ValueError(f"`ranks_per_node` must divide the world size {world_size}, got {size}")
    return size


class Topology:
    """The wires of this rank, one per leg.

    Ranks ``[k L, (k+1) L)`` form node ``k``; the ranks with one place in their nodes form a rail.
    Flat exchanges have nodes of one rank and a single rail.

    Args:
        ranks: Global ranks that take part.
        config: Settings.
        timeout: Of the groups.
        shared: One group per set of ranks for all legs (NCCL, where one thread issues everything)
            instead of one per leg.
        vary: Whether compressed messages vary in size.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        config: ExchangeConfig,
        timeout: timedelta | None,
        shared: bool,
        vary: bool,
    ) -> None:
        self.local_size = node_size(config, len(ranks))
        self.nodes = len(ranks) // self.local_size
        self.rank = list(ranks).index(dist.get_rank())
        node, self.local_rank = divmod(self.rank, self.local_size)
        peers = list(ranks[node * self.local_size : (node + 1) * self.local_size])
        rail = list(ranks[self.local_rank :: self.local_size])
        halves = 2 if config.scheme == "two_phase" else 1
        self.rail = _wires(rail, halves, timeout, shared, vary)
        self.node = _wires(peers, 2, timeout, shared, vary=False)

    @property
    def wires(self) -> list[Wire]:
        """Return all wires."""
        return self.rail + self.node

    @property
    def legs(self) -> int:
        """Return the number of legs of an exchange."""
        return len(self.wires)


def _wires(members: list[int], count: int, timeout: timedelta | None, shared: bool, vary: bool) -> list[Wire]:
    """Return wires over new groups of ``members``; none if there is nobody to talk to."""
    if len(members) == 1:
        return []

    def group() -> dist.ProcessGroup:
        # Local synchronisation: only the members have to call, each rank for its own node and rail.
        return cast(
            dist.ProcessGroup, dist.new_group(members, timeout=timeout, use_local_synchronization=True)
        )

    if shared:
        common = group()
        return [Wire(common) for _ in range(count)]
    return [Wire(group(), group() if vary else None) for _ in range(count)]
