"""Runs another library's hook on one bucket at a time, so that its follow-up collectives keep an order.

Torch's PowerSGD hook starts its second and third all-reduce from completion callbacks. With several
buckets in flight on gloo these callbacks run in whatever order messages arrive, ranks pair up
collectives of different buckets, and the run dies of "distributed collective mismatch". One bucket
at a time, in the order in which DDP hands them over (the same on every rank), leaves one order only.
NCCL needs none of this: there futures complete when a collective is queued, so callbacks run in place.
"""

# No `from __future__ import annotations` here: DDP compares the annotation objects of hooks.

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, not in the stubs

from lightning_n2uq.distributed.pipeline import Pipeline

Hook = Callable[[Any, GradBucket], torch.futures.Future[torch.Tensor]]


class OrderedState:
    """State of :func:`ordered_hook`.

    Args:
        hook: The hook to run.
        state: Its state; the hook should have a process group to itself.
    """

    __slots__ = ("_pipeline", "hook", "state")

    def __init__(self, hook: Hook, state: object) -> None:
        self.hook, self.state = hook, state
        self._pipeline: Pipeline | None = None

    def run(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Queue a bucket."""
        if bucket.buffer().device.type == "cuda":
            return self.hook(self.state, bucket)
        if self._pipeline is None:
            self._pipeline = Pipeline(1, bucket.buffer().device, lambda error: error)
        task = _HookTask(self, bucket)
        result = task.future.then(lambda done: done.value())  # raises in DDP what was set as exception
        self._pipeline.submit(task)
        return result

    def close(self) -> None:
        """End the thread."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None


class _HookTask:
    def __init__(self, state: OrderedState, bucket: GradBucket) -> None:
        self._state, self._bucket = state, bucket
        self.future: torch.futures.Future[torch.Tensor] = torch.futures.Future()

    def run(self, stage: int) -> None:
        """Run the hook and wait for all of its collectives."""
        self.future.set_result(self._state.hook(self._state.state, self._bucket).wait())

    def fail(self, error: BaseException) -> None:
        """Hand an error to the training thread."""
        if not self.future.done():
            self.future.set_exception(error)  # type: ignore[arg-type]  # torch's stub is too narrow


def ordered_hook(state: OrderedState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Run ``state.hook`` on the buckets one after the other, without blocking the backward pass.

    Args:
        state: One per DDP module.
        bucket: From DDP.

    Returns:
        Future of what the hook returns.
    """
    return state.run(bucket)
