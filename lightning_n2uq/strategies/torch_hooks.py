"""Torch's own communication hooks as strategies, on every device type."""

# No `from __future__ import annotations` here: DDP compares the annotation objects of hooks.

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_n2uq.distributed.pipeline import Pipeline
from lightning_n2uq.strategies.base import HookedDDPStrategy
from lightning_n2uq.utils.compat import GradBucket
from lightning_n2uq.utils.validation import check_choice, check_integer

HOOKS = ("fp16", "bf16", "powersgd")

Hook = Callable[[Any, GradBucket], torch.futures.Future[torch.Tensor]]


def half_hook(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """All-reduces a bucket in fp16."""
    return default_hooks.fp16_compress_hook(group, bucket)


def bfloat16_hook(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """All-reduces a bucket in bf16; torch's function under its own name is refused without CUDA."""
    return default_hooks.bf16_compress_hook(group, bucket)


class OrderedState:
    """State of `ordered_hook`, which runs another hook on one bucket at a time.

    Torch's PowerSGD hook starts its second and third all-reduce from completion callbacks. With several
    buckets in flight on gloo these callbacks run in whatever order messages arrive, ranks pair up
    collectives of different buckets, and the run dies of "distributed collective mismatch". One bucket
    at a time, in the order in which DDP hands them over (the same on every rank), leaves one order only.
    NCCL needs none of this: there futures complete when a collective is queued, so callbacks run in place.

    Args:
        hook: The hook to run.
        state: The hook's state; the hook should have a process group to itself.
    """

    __slots__ = ("_pipeline", "hook", "state")

    def __init__(self, hook: Hook, state: object) -> None:
        self.hook, self.state = hook, state
        self._pipeline: Pipeline | None = None

    def run(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Queues a bucket."""
        if bucket.buffer().device.type == "cuda":
            return self.hook(self.state, bucket)
        if self._pipeline is None:
            self._pipeline = Pipeline(1, bucket.buffer().device, lambda error: error)
        task = _HookTask(self, bucket)
        result = task.future.then(lambda done: done.value())  # raises in DDP what was set as exception
        self._pipeline.submit(task)
        return result

    def close(self) -> None:
        """Ends the thread."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None


class _HookTask:
    def __init__(self, state: OrderedState, bucket: GradBucket) -> None:
        self._state, self._bucket = state, bucket
        self.future: torch.futures.Future[torch.Tensor] = torch.futures.Future()

    def run(self, stage: int) -> None:
        """Runs the hook and waits for all of its collectives."""
        self.future.set_result(self._state.hook(self._state.state, self._bucket).wait())

    def fail(self, error: BaseException) -> None:
        """Hands an error to the training thread."""
        if not self.future.done():
            self.future.set_exception(error)  # type: ignore[arg-type]  # torch's stub is too narrow


def ordered_hook(state: OrderedState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Runs `state.hook` on the buckets one after the other, without blocking the backward pass.

    Args:
        state: The state, one per DDP module.
        bucket: A bucket from DDP.

    Returns:
        Future of what the hook returns.
    """
    return state.run(bucket)


def powersgd_state(rank: int, start: int, timeout: timedelta | None = None) -> OrderedState:
    """Returns a state with which `ordered_hook` runs torch's PowerSGD. A collective call.

    The group is PowerSGD's own: its collectives must not mix with others of the training thread.

    Args:
        rank: The rank of the approximation.
        start: The first compressed step, at least 2.
        timeout: How long the process group waits for a peer before it fails; torch's default if None.
    """
    state = PowerSGDState(dist.new_group(timeout=timeout), rank, start_powerSGD_iter=start)
    return OrderedState(powerSGD_hook, state)


class TorchHookStrategy(HookedDDPStrategy):
    """DDP with one of torch's communication hooks, for comparison; also on CPU.

    Args:
        hook: `fp16`, `bf16` or `powersgd` (Vogels et al., NeurIPS 2019, arXiv 1905.13727).
        powersgd_rank: The rank of PowerSGD's approximation.
        powersgd_start: The number of steps exchanged in full precision before PowerSGD starts; at least 2,
            because DDP rebuilds its buckets after the first.
        **ddp_arguments: The arguments of `HookedDDPStrategy`.

    Raises:
        ValueError: If an argument is not allowed.
    """

    def __init__(
        self,
        hook: Literal["fp16", "bf16", "powersgd"] = "fp16",
        powersgd_rank: int = 1,
        powersgd_start: int = 10,
        **ddp_arguments: Any,  # noqa: ANN401  # typed by HookedDDPStrategy
    ) -> None:
        super().__init__(**ddp_arguments)
        self.hook = check_choice("hook", hook, HOOKS)
        self.powersgd_rank = check_integer("powersgd_rank", powersgd_rank, 1)
        self.powersgd_start = check_integer("powersgd_start", powersgd_start, 2)
        self._ordered: OrderedState | None = None

    @override
    def make_hook(self, model: DistributedDataParallel) -> tuple[object, Callable[..., Any]]:
        """Returns torch's hook and its state."""
        if self.hook != "powersgd":
            return dist.group.WORLD, half_hook if self.hook == "fp16" else bfloat16_hook
        self._ordered = powersgd_state(self.powersgd_rank, self.powersgd_start, self.timeout)
        return self._ordered, ordered_hook

    @override
    def teardown(self) -> None:
        """Ends the hook's thread."""
        if self._ordered is not None:
            self._ordered.close()
            self._ordered = None
        super().teardown()
