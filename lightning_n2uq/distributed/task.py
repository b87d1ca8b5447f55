"""Gradients on their way through the pipeline: one task per unit, one future per DDP bucket."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_n2uq.distributed.chain import Chain
from lightning_n2uq.distributed.stats import ExchangeStats


@dataclass(frozen=True)
class Context:
    """What all tasks of an exchange share.

    Attributes:
        stats: Counters.
        seed: From (step, unit, leg, message) to the seed of a message.
        lossy_leg: The leg that quantizes this rank's gradient.
        parts: Stages per leg: 1, or 2 where sizes vary and encoding goes on while they are told.
        bucket_size: Coordinates of a codec bucket.
        close_step: Called with the step's number when its last gradient is back.
    """

    stats: ExchangeStats
    seed: Callable[[int, int, int, int], int]
    lossy_leg: int
    parts: int
    bucket_size: int
    close_step: Callable[[int], None]


@dataclass(frozen=True)
class BucketJob:
    """One DDP bucket under way.

    Attributes:
        future: Completes with ``buffer`` when its last unit is back.
        buffer: The flat gradient, overwritten by the mean.
        step: Number of the step.
        last: Whether it is the step's last bucket.
        ready: On CUDA, the point of the backward pass at which ``buffer`` is complete.
    """

    future: torch.futures.Future[Tensor]
    buffer: Tensor
    step: int
    last: bool
    ready: torch.cuda.Event | None


class UnitTask:
    """One unit of a bucket; satisfies :class:`~lightning_n2uq.distributed.pipeline.Task`.

    Args:
        context: Shared things.
        job: The bucket.
        chain: The unit's legs.
        final: Whether it is the bucket's last unit.
    """

    def __init__(self, context: Context, job: BucketJob, chain: Chain, final: bool) -> None:
        self._context, self._job, self._chain, self._final = context, job, chain, final
        self._view = job.buffer[chain.unit.start : chain.unit.stop]
        self._work: dist.Work | None = None
        self._sent = 0.0

    def run(self, stage: int) -> None:
        """Decode what a leg received and encode for the next; or send what is encoded; or both."""
        leg, part = divmod(stage, self._context.parts)
        if part == 0:
            self._receive(leg)
            if leg == len(self._chain.legs):
                self._finish()
                return
            self._encode(leg)
        if part == self._context.parts - 1:
            self._transmit(leg)

    def _encode(self, leg: int) -> None:
        step, chain, context = self._job.step, self._chain, self._context
        began = time.perf_counter()
        source = chain.source(leg, self._view)
        self._work = chain.legs[leg].encode(
            source, lambda message: context.seed(step, chain.index, leg, message)
        )
        context.stats.add(encode_s=time.perf_counter() - began)
        if leg == context.lossy_leg and context.stats.measures(step):
            error_sq, norm_sq = chain.legs[leg].error(source)
            context.stats.add(error_sq=error_sq, norm_sq=norm_sq)

    def _transmit(self, leg: int) -> None:
        if self._work is not None:
            self._work.wait()  # for the sizes
        self._sent = time.perf_counter()
        self._work = self._chain.legs[leg].transmit()

    def _receive(self, leg: int) -> None:
        """Decode what the leg before ``leg`` received; before the first, wait for the gradient."""
        if leg == 0:
            if self._job.ready is not None:
                self._job.ready.wait()
            return
        if self._work is not None:
            self._work.wait()  # on CUDA only the side stream waits
        arrived = time.perf_counter()
        self._context.stats.sending(self._sent, arrived)
        self._chain.legs[leg - 1].finish(self._chain.target(leg, self._view))
        self._context.stats.add(decode_s=time.perf_counter() - arrived)

    def _finish(self) -> None:
        self._chain.store(self._view)
        stats = self._context.stats
        if stats.watch:
            stats.add(nonfinite=count_nonfinite(self._view, self._context.bucket_size))
        if not self._final:
            return
        if self._job.last:
            self._context.close_step(self._job.step)
        self._job.future.set_result(self._job.buffer)

    def fail(self, error: BaseException) -> None:
        """Hand an error to the training thread, which waits for the bucket's future."""
        if not self._job.future.done():
            self._job.future.set_exception(error)  # type: ignore[arg-type]  # torch's stub is too narrow


def count_nonfinite(values: Tensor, bucket_size: int) -> int:
    """Return how many runs of ``bucket_size`` coordinates hold a NaN or an infinity."""
    if bool(torch.isfinite(values.sum())):  # one cheap pass in the ordinary case
        return 0
    places = (~torch.isfinite(values)).nonzero().view(-1)
    return int(torch.unique(places.div(bucket_size, rounding_mode="floor")).numel())
