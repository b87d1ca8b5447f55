"""Torch's own communication hooks as strategies, on every device type."""

# No `from __future__ import annotations` here: DDP compares the annotation objects of hooks.

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, not in the stubs
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_n2uq.distributed.ordered import OrderedState, ordered_hook
from lightning_n2uq.strategies.base import HookedDDPStrategy

HOOKS = ("fp16", "bf16", "powersgd")


def half_hook(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """All-reduce a bucket in fp16."""
    return default_hooks.fp16_compress_hook(group, bucket)


def bfloat16_hook(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """All-reduce a bucket in bf16; torch's function under its own name is refused without CUDA."""
    return default_hooks.bf16_compress_hook(group, bucket)


class TorchHookStrategy(HookedDDPStrategy):
    """DDP with one of torch's communication hooks, for comparison; also on CPU.

    Args:
        hook: ``"fp16"``, ``"bf16"`` or ``"powersgd"`` (Vogels et al., NeurIPS 2019, arXiv 1905.13727).
        powersgd_rank: Rank of PowerSGD's approximation.
        powersgd_start: Steps exchanged in full precision before PowerSGD starts; at least 2, because
            DDP rebuilds its buckets after the first.
        find_unused_parameters: As in ``DistributedDataParallel``.
        static_graph: As in ``DistributedDataParallel``.
        gradient_as_bucket_view: As in ``DistributedDataParallel``.
        bucket_cap_mb: Size of DDP's buckets in MiB.
        process_group_backend: Chosen by device if None.
        timeout: Of process groups.
        start_method: How Lightning starts the processes of a node.

    Raises:
        ValueError: If an argument is not allowed.
    """

    def __init__(
        self,
        hook: Literal["fp16", "bf16", "powersgd"] = "fp16",
        powersgd_rank: int = 1,
        powersgd_start: int = 10,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        bucket_cap_mb: float | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        if hook not in HOOKS:
            raise ValueError(f"`hook` must be one of {', '.join(HOOKS)}, got {hook!r}")
        if powersgd_rank < 1:
            raise ValueError(f"`powersgd_rank` must be at least 1, got {powersgd_rank}")
        if powersgd_start < 2:
            raise ValueError(f"`powersgd_start` must be at least 2, got {powersgd_start}")
        super().__init__(
            find_unused_parameters=find_unused_parameters,
            static_graph=static_graph,
            gradient_as_bucket_view=gradient_as_bucket_view,
            bucket_cap_mb=bucket_cap_mb,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self.hook, self.powersgd_rank, self.powersgd_start = hook, powersgd_rank, powersgd_start
        self._ordered: OrderedState | None = None

    @override
    def make_hook(self, model: DistributedDataParallel) -> tuple[object, Callable[..., Any]]:
        """Return torch's hook and its state."""
        if self.hook != "powersgd":
            return dist.group.WORLD, half_hook if self.hook == "fp16" else bfloat16_hook
        self._ordered = powersgd_state(self.powersgd_rank, self.powersgd_start, self.timeout)
        return self._ordered, ordered_hook

    @override
    def teardown(self) -> None:
        """End the hook's thread."""
        if self._ordered is not None:
            self._ordered.close()
            self._ordered = None
        super().teardown()


def powersgd_state(rank: int, start: int, timeout: timedelta | None = None) -> OrderedState:
    """Return a state with which ``ordered_hook`` runs torch's PowerSGD. A collective call.

    The group is PowerSGD's own: its collectives must not mix with others of the training thread.

    Args:
        rank: Of the approximation.
        start: First compressed step, at least 2.
        timeout: Of the process group.
    """
    state = PowerSGDState(dist.new_group(timeout=timeout), rank, start_powerSGD_iter=start)
    return OrderedState(powerSGD_hook, state)
