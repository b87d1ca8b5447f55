"""Buffers of ranks that train alone: running statistics are averaged, everything else is rank 0's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class AgreedBuffers:
    """A module's buffers as all ranks last agreed on them.

    Only what changed on some rank travels: tables and masks stay where they are, infinities included.
    Floating ones, such as the running statistics of batch norm, become the agreed value plus the mean change,
    in fp32; others, such as counters and masks of integers, those of the first rank.

    Args:
        module: Whose buffers are followed.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._agreed: dict[str, Tensor] = {}

    def follow(self) -> None:
        """Takes the present values, equal on all ranks, as agreed."""
        self._agreed = self.own()

    def own(self) -> dict[str, Tensor]:
        """Returns copies of this rank's buffers."""
        return {name: buffer.detach().clone() for name, buffer in self._module.named_buffers()}

    def give(self) -> None:
        """Gives the agreed values to the module."""
        self.take(self._agreed)

    @torch.no_grad()
    def take(self, own: Mapping[str, Tensor]) -> None:
        """Gives values, as `own` returned them, to the module."""
        for name, buffer in self._module.named_buffers():
            if name in own and own[name].shape == buffer.shape and not _equal(buffer, own[name]):
                buffer.copy_(own[name])

    @torch.no_grad()
    def average(self, group: dist.ProcessGroup | None, device: torch.device) -> int:
        """Makes the buffers equal on all ranks. A collective call.

        Args:
            group: The ranks; the default group if None.
            device: The device on which they communicate.

        Returns:
            The number of coordinates that were averaged.
        """
        buffers = dict(self._module.named_buffers())
        flags = [int(not self._is_agreed(name, buffer)) for name, buffer in buffers.items()]
        if not flags:
            return 0
        changed = torch.tensor(flags, dtype=torch.int32, device=device)
        dist.all_reduce(changed, dist.ReduceOp.MAX, group=group)
        moved = {n: b for (n, b), flag in zip(buffers.items(), changed.tolist(), strict=True) if flag}
        means = {n: b for n, b in moved.items() if b.is_floating_point() and n in self._agreed}
        averaged = self._average(means, group, device)
        copy_from_first([b for n, b in moved.items() if n not in means], group, device)
        self.follow()
        return averaged

    def _is_agreed(self, name: str, buffer: Tensor) -> bool:
        return name in self._agreed and _equal(buffer, self._agreed[name])

    def _average(
        self, buffers: Mapping[str, Tensor], group: dist.ProcessGroup | None, device: torch.device
    ) -> int:
        """Adds the mean change to the agreed values."""
        if not buffers:
            return 0
        changes = []
        for name, buffer in buffers.items():
            agreed = self._agreed[name]
            change = torch.where(agreed == buffer, torch.zeros_like(buffer), agreed - buffer)
            changes.append(change.flatten().to(device, torch.float32))
        flat = torch.cat(changes)
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        for (name, buffer), change in zip(
            buffers.items(), flat.split([change.numel() for change in changes]), strict=True
        ):
            agreed = self._agreed[name]
            buffer.copy_(agreed - change.view(buffer.shape).to(buffer.device))
        return flat.numel()


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor], group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Gives every rank the first rank's values, one message per dtype. A collective call.

    Args:
        tensors: Of the same shapes and dtypes on every rank.
        group: The ranks; the default group if None.
        device: The device on which they communicate.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    first = dist.get_process_group_ranks(group)[0]
    for members in by_dtype.values():
        flat = torch.cat([member.detach().flatten().to(device) for member in members])
        dist.broadcast(flat.view(torch.uint8), first, group=group)
        _split_into(members, flat)


def _split_into(members: Sequence[Tensor], flat: Tensor) -> None:
    for member, piece in zip(members, flat.split([member.numel() for member in members]), strict=True):
        if member.numel():
            member.copy_(piece.view(member.shape))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors are the same; a NaN is unlike itself, which sends it once more."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
