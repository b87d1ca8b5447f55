"""The collectives of an exchange on one process group, with their bytes counted where they are issued."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 16  # a payload starts at a multiple of this, so that codecs may view it as wider words


def padded(size: int) -> int:
    """Return ``size`` rounded up to the alignment of payloads."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def all_gather(
    recv: Tensor, send: Tensor, group: dist.ProcessGroup | None, async_op: bool
) -> dist.Work | None:
    """Send ``send`` to every rank; ``recv`` gets everybody's, in rank order.

    torch 2.14 renamed the function and warns at every call of the old name, which torch 2.8 still needs.
    """
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work | None = gather(recv, send, group=group, async_op=async_op)
    return work


class Wire:
    """One process group that carries one leg of the exchange.

    Every leg has its own group: within a group collectives are issued by one thread in the order of
    the units, which is the same on all ranks, so the groups need no order among each other. That is
    what makes several DDP buckets in flight safe.

    Args:
        group: Process group; only this wire may use it.
        sizes_group: Another one for the sizes of messages that vary in size; ``group`` if None.

    Attributes:
        sent: Bytes handed to other ranks so far (what a rank keeps for itself is not counted).
    """

    def __init__(self, group: dist.ProcessGroup, sizes_group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.sizes_group = group if sizes_group is None else sizes_group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.sent = 0

    def all_to_all(
        self, recv: Tensor, send: Tensor, recv_sizes: Sequence[int], send_sizes: Sequence[int]
    ) -> dist.Work | None:
        """Start sending the ``i``-th piece of ``send`` to rank ``i``; sizes in bytes, tensors 1-D uint8."""
        self.sent += sum(send_sizes) - send_sizes[self.rank]
        return dist.all_to_all_single(
            recv, send, list(recv_sizes), list(send_sizes), group=self.group, async_op=True
        )

    def all_gather(self, recv: Tensor, send: Tensor) -> dist.Work | None:
        """Start sending ``send`` to every rank; as many bytes on each of them."""
        self.sent += send.numel() * (self.size - 1)
        return all_gather(recv, send, self.group, async_op=True)

    def announce(self, theirs: Tensor, mine: Tensor) -> dist.Work | None:
        """Start telling every rank the size of its message; int64 tensors, one element per rank."""
        self.sent += mine.element_size() * (self.size - 1)
        return dist.all_to_all_single(theirs, mine, group=self.sizes_group, async_op=True)
