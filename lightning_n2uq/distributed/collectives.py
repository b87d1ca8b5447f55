"""The ranks of an exchange: their handshake, their process groups (flat or by node), the collectives."""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Protocol, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_n2uq.distributed.config import ExchangeConfig

_RECORD_BYTES = 4096


class Work(Protocol):
    """What is under way, as torch's `Work`."""

    def wait(self) -> object:
        """Returns when what this rank receives is there."""


class Collectives(ABC):
    """The collectives of one phase, with their bytes counted where they are issued.

    Args:
        rank: This rank among those that take part.
        size: How many they are.

    Attributes:
        group: Their process group, where they are processes.
        sent: Bytes handed to other ranks so far (what a rank keeps for itself is not counted).
    """

    group: dist.ProcessGroup | None = None

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.sent = rank, size, 0

    def all_to_all(
        self, recv: Tensor, send: Tensor, recv_sizes: Sequence[int], send_sizes: Sequence[int]
    ) -> Work | None:
        """Starts sending the `i`-th piece of `send` to rank `i`; sizes in bytes, tensors 1-D uint8."""
        self.sent += sum(send_sizes) - send_sizes[self.rank]
        return self._all_to_all(recv, send, list(recv_sizes), list(send_sizes))

    def all_gather(self, recv: Tensor, send: Tensor) -> Work | None:
        """Starts sending `send` to every rank; as many bytes on each of them."""
        self.sent += send.numel() * (self.size - 1)
        return self._all_gather(recv, send)

    def announce_sizes(self, theirs: Tensor, mine: Tensor) -> Work | None:
        """Starts telling every rank the size of its message; int64 tensors, one element per rank."""
        self.sent += mine.element_size() * (self.size - 1)
        return self._announce_sizes(theirs, mine)

    @abstractmethod
    def _all_to_all(
        self, recv: Tensor, send: Tensor, recv_sizes: list[int], send_sizes: list[int]
    ) -> Work | None: ...

    @abstractmethod
    def _all_gather(self, recv: Tensor, send: Tensor) -> Work | None: ...

    @abstractmethod
    def _announce_sizes(self, theirs: Tensor, mine: Tensor) -> Work | None: ...


class ProcessCollectives(Collectives):
    """Collectives between processes.

    Every phase has its own process group: within a group collectives are issued by one thread in the order
    of the units, which is the same on all ranks, so the groups need no order among each other. That is what
    makes several DDP buckets in flight safe.

    Args:
        group: The process group; only this phase may use it.
        sizes_group: Another one for the sizes of messages that vary in size; `group` if None.
    """

    def __init__(self, group: dist.ProcessGroup, sizes_group: dist.ProcessGroup | None = None) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self.group = group
        self.sizes_group = group if sizes_group is None else sizes_group

    def _all_to_all(
        self, recv: Tensor, send: Tensor, recv_sizes: list[int], send_sizes: list[int]
    ) -> Work | None:
        return dist.all_to_all_single(recv, send, recv_sizes, send_sizes, group=self.group, async_op=True)

    def _all_gather(self, recv: Tensor, send: Tensor) -> Work | None:
        return all_gather(recv, send, self.group, async_op=True)

    def _announce_sizes(self, theirs: Tensor, mine: Tensor) -> Work | None:
        return dist.all_to_all_single(theirs, mine, group=self.sizes_group, async_op=True)


def all_gather(
    recv: Tensor, send: Tensor, group: dist.ProcessGroup | None, async_op: bool
) -> dist.Work | None:
    """Sends `send` to every rank; `recv` gets everybody's, in rank order.

    torch 2.14 renamed the function and warns at every call of the old name, which torch 2.8 still needs.
    """
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work | None = gather(recv, send, group=group, async_op=async_op)
    return work


Join = Callable[[list[int], int, bool], Sequence[Collectives]]
"""From ranks, a number and whether messages vary in size to as many collectives over these ranks.

None where there is nobody to talk to.
"""


class ExchangeGroups:
    """One rank's collectives, one per phase of the exchange.

    Ranks `[k L, (k+1) L)` form node `k`, with `L` ranks per node. Intra-node collectives join the ranks of
    a node, inter-node collectives the ranks with one place in their nodes. A flat exchange has nodes of one
    rank, and no intra-node collectives.

    Args:
        ranks: Global ranks that take part.
        rank: The one whose collectives these are.
        config: The settings.
        vary: Whether compressed messages vary in size.
        join: Makes collectives.

    Raises:
        ValueError: If the size of a node is not known or nodes would differ in size.
    """

    def __init__(
        self, ranks: Sequence[int], rank: int, config: ExchangeConfig, vary: bool, join: Join
    ) -> None:
        self.rank, self.world_size = rank, len(ranks)
        self.local_size = _ranks_per_node(config, len(ranks))
        self.nodes = len(ranks) // self.local_size
        node, self.local_rank = divmod(list(ranks).index(rank), self.local_size)
        peers = list(ranks[node * self.local_size : (node + 1) * self.local_size])
        others = list(ranks[self.local_rank :: self.local_size])
        halves = 2 if config.scheme == "two_phase" else 1
        self.inter_node = join(others, halves, vary)
        self.intra_node = join(peers, 2, False)
        self.phases = len(self.inter_node) + len(self.intra_node)

    @property
    def sent(self) -> int:
        """Bytes handed to other ranks so far."""
        return sum(collectives.sent for collectives in (*self.inter_node, *self.intra_node))


def process_groups(
    ranks: Sequence[int], config: ExchangeConfig, timeout: timedelta | None, shared: bool, vary: bool
) -> ExchangeGroups:
    """Returns this process's collectives over new process groups. A collective call.

    Args:
        ranks: Global ranks that take part.
        config: The settings.
        timeout: How long the groups wait for a peer before they fail; torch's default if None.
        shared: Whether all phases of a set of ranks share one group (NCCL, where one thread issues
            everything) instead of one each.
        vary: Whether compressed messages vary in size.
    """
    join = partial(_join_processes, timeout=timeout, shared=shared)
    return ExchangeGroups(ranks, dist.get_rank(), config, vary, join)


def _ranks_per_node(config: ExchangeConfig, world_size: int) -> int:
    """Returns how many ranks share a node; 1 without `hierarchical`."""
    if not config.hierarchical:
        return 1
    size = config.ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if size < 1:
        raise ValueError("ranks_per_node: got None, which needs LOCAL_WORLD_SIZE in the environment")
    if world_size % size:
        raise ValueError(f"ranks_per_node: got {size}, allowed are divisors of the world size {world_size}")
    return size


def _join_processes(
    members: list[int], count: int, vary: bool, timeout: timedelta | None, shared: bool
) -> list[ProcessCollectives]:
    """Returns collectives over new groups of `members`; none if there is nobody to talk to."""
    if len(members) == 1:
        return []

    def group() -> dist.ProcessGroup:
        # Local synchronization: only the members have to call, each rank for its own sets of ranks.
        return cast(
            dist.ProcessGroup, dist.new_group(members, timeout=timeout, use_local_synchronization=True)
        )

    if shared:
        common = group()
        return [ProcessCollectives(common) for _ in range(count)]
    return [ProcessCollectives(group(), group() if vary else None) for _ in range(count)]


def time_all_reduce(coordinates: int, device: torch.device, limit: int = 1 << 22) -> float:
    """Returns the seconds an fp32 all-reduce over the default group takes. A collective call.

    Args:
        coordinates: The size of the gradient.
        device: The device of the gradient.
        limit: The most coordinates to measure; more are extrapolated, to bound the time on slow links.
    """
    measured = max(1, min(coordinates, limit))
    values = torch.zeros(measured, device=device)
    dist.all_reduce(values[:1])  # connects, and lets the ranks start together
    _wait_for(device)
    began = time.perf_counter()
    dist.all_reduce(values)
    _wait_for(device)
    return (time.perf_counter() - began) * coordinates / measured


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shake_hands(facts: Mapping[str, Any], group: dist.ProcessGroup | None, device: torch.device) -> str:
    """Compares the ranks' settings before the first message. A collective call.

    Args:
        facts: The settings of this rank, which have to be equal on all.
        group: The process group of the ranks; the default group if None.
        device: The device on which the group communicates.

    Returns:
        A name for the exchange, equal on all of its ranks and unlike that of any other.

    Raises:
        ValueError: On every rank, if two ranks disagree.
    """
    records = _gather_records({**facts, "name": uuid4().hex}, group, device)
    names = [str(record.pop("name")) for record in records]
    require_agreement(records, dist.get_process_group_ranks(group))
    return names[0]


def _gather_records(
    record: Mapping[str, Any], group: dist.ProcessGroup | None, device: torch.device
) -> list[dict[str, Any]]:
    """Returns every rank's record, in rank order.

    The records travel as fixed-size bytes, so that ranks which disagree about everything else still
    agree about the size of this message, and nothing is unpickled.
    """
    text = json.dumps(record).encode()
    if len(text) > _RECORD_BYTES:
        raise ValueError(
            f"skip_patterns, levels: got {len(text)} bytes of settings, allowed are {_RECORD_BYTES}"
        )
    return [json.loads(row) for row in _gather_bytes(text, _RECORD_BYTES, group, device)]


def _gather_bytes(
    text: bytes, length: int, group: dist.ProcessGroup | None, device: torch.device
) -> list[bytes]:
    """Returns every rank's text without bytes 0, at most `length` long."""
    size = dist.get_world_size(group)
    mine = torch.zeros(length, dtype=torch.uint8)
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    theirs = torch.empty(size * length, dtype=torch.uint8, device=device)
    all_gather(theirs, mine.to(device), group, async_op=False)
    return [bytes(row.tolist()).rstrip(b"\0") for row in theirs.cpu().view(size, length)]


def require_equal(facts: Mapping[str, Any], device: torch.device) -> None:
    """Compares facts of any size between the ranks of the default group. A collective call.

    Raises:
        ValueError: On every rank, if two ranks disagree.
    """
    text = json.dumps(facts).encode()
    length = torch.tensor([len(text)], device=device)
    dist.all_reduce(length, dist.ReduceOp.MAX)
    rows = _gather_bytes(text, int(length), None, device)
    require_agreement([json.loads(row) for row in rows], range(len(rows)))


def require_agreement(records: Sequence[Mapping[str, Any]], ranks: Sequence[int]) -> None:
    """Raises the same error on every rank if two ranks disagree.

    Args:
        records: The settings of every rank.
        ranks: The ranks' numbers.

    Raises:
        ValueError: Names the first setting that differs and its two values.
    """
    reference = records[0]
    for rank, record in zip(ranks[1:], records[1:], strict=True):
        for name in [*reference, *(record.keys() - reference.keys())]:
            if reference.get(name) != record.get(name):
                raise ValueError(
                    f"ranks disagree on `{name}`: rank {ranks[0]} has {reference.get(name)!r}, "
                    f"rank {rank} has {record.get(name)!r}"
                )
