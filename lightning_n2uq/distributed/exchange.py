"""The exchange of gradients, step by step.

A sum cannot be taken on codes, so the all-reduce of plain DDP becomes, for every unit of a DDP bucket:

1. Encode: quantize the own gradient, one message per rank about that rank's chunk of the unit.
2. All-to-all: the messages about chunk `i` travel to rank `i`.
3. Decode and average: rank `i` takes the mean of all messages about its chunk, in rank order, in fp32.
4. Encode: quantize the mean, by the codec of the second phase.
5. All-gather: the encoded means travel to all ranks.
6. Decode: every rank writes the same numbers, decoded from the same bytes, into the gradient.

Steps 1 to 3 are a `ReduceScatterPhase`, steps 4 to 6 an `AllGatherPhase`. With `scheme="all_gather"` (the
paper's) one `AllGatherMeanPhase` does it all: encode, all-gather, decode and average. With `hierarchical` the
compressed phases run between nodes, and a full-precision reduce-scatter inside the node precedes them, an
all-gather follows. Where messages vary in size, their sizes are announced between encoding and sending.

Ramezani-Kebrya et al., "NUQSGD", JMLR 22(114), 2021, arXiv 1908.06077.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_n2uq._version import __version__
from lightning_n2uq.compression import Codec, MessageSeed, mix_seed
from lightning_n2uq.distributed.collectives import ExchangeGroups, Work, process_groups, shake_hands
from lightning_n2uq.distributed.config import ExchangeConfig
from lightning_n2uq.distributed.failure_report import FailureReport
from lightning_n2uq.distributed.partition import Place, Span, bucket_span, split_units
from lightning_n2uq.distributed.phases import Phase, build_phases
from lightning_n2uq.distributed.pipeline import Pipeline, Task
from lightning_n2uq.distributed.stats import ExchangeStats
from lightning_n2uq.utils import compat

_UNITS_PER_BUCKET = 1 << 16  # numbering only: units of different DDP buckets never share a seed
_ALL_RANKS = -1  # stands for a rank in seeds that all of them share


@dataclass(frozen=True)
class BucketInFlight:
    """A DDP bucket that is being exchanged.

    Attributes:
        future: Completes with `buffer` when the bucket's last unit is back.
        buffer: The flat gradient, overwritten by the mean.
        step: The number of the step.
        last: Whether it is the step's last bucket.
        ready: On CUDA, the point of the backward pass at which `buffer` is complete.
    """

    future: torch.futures.Future[Tensor]
    buffer: Tensor
    step: int
    last: bool
    ready: torch.cuda.Event | None


class UnitExchange:
    """One unit's phases and the buffers between them, reused at every step; a task of the pipeline.

    Args:
        exchange: What all units share.
        unit: The unit's coordinates in the DDP bucket.
        index: The number of the unit, unique among all units of a step and equal on all ranks.
        phases: From `build_phases`.
        dtype: The dtype of the gradients; the arithmetic is fp32.

    Attributes:
        pending: Residuals of an earlier layout of the buckets, added to the next gradient.
    """

    def __init__(
        self, exchange: Exchange, unit: Span, index: int, phases: Sequence[Phase], dtype: torch.dtype
    ) -> None:
        self.device = device = exchange.device
        self.where, self.index, self.phases = unit.slice, index, list(phases)
        self.pending: Tensor | None = None
        self._exchange, self._stats = exchange, exchange.stats
        self._means = [torch.empty(phase.output_numel, device=device) for phase in self.phases[:-1]]
        self._wide = None if dtype == torch.float32 else torch.empty(unit.numel, device=device)
        self._bucket: BucketInFlight | None = None
        self._final = False
        self._work: Work | None = None
        self._sent = 0.0

    @property
    def lossy_phases(self) -> list[Phase]:
        """The phases that keep residuals."""
        return [phase for phase in self.phases if phase.feedback is not None]

    def begin(self, bucket: BucketInFlight, final: bool) -> UnitExchange:
        """Takes the gradients of a step; `final` marks the bucket's last unit."""
        self._bucket, self._final = bucket, final
        return self

    def run(self, stage: int) -> None:
        """Decodes what the phase before received, then encodes and sends for the next.

        Where messages vary in size a phase has a stage for encoding and one for sending, so that the next
        unit is encoded while the sizes of this one travel.
        """
        bucket = self._bucket
        if bucket is None:  # a failure has ended this step
            return
        phase, part = divmod(stage, self._exchange.stages_per_phase)
        gradient = bucket.buffer[self.where]
        if part == 0:
            if phase > 0:
                self._receive(phase - 1, gradient)
            elif bucket.ready is not None:
                bucket.ready.wait()
            if phase == len(self.phases):
                self._finish(bucket, gradient)
                return
            self._encode(phase, gradient, bucket.step)
        if part == self._exchange.stages_per_phase - 1:
            self._transmit(phase)

    def _encode(self, phase: int, gradient: Tensor, step: int) -> None:
        """Steps 1 and 4."""
        exchange = self._exchange
        began = time.perf_counter()
        source = self._means[phase - 1] if phase > 0 else self._corrected(gradient)
        self._work = self.phases[phase].encode(
            source, lambda message: exchange.seed(step, self.index, phase, message)
        )
        self._stats.add(encode_s=time.perf_counter() - began)
        if phase == exchange.first_lossy_phase and self._stats.measures(step):
            error_sq, norm_sq = self.phases[phase].error(source)
            self._stats.add(error_sq=error_sq, norm_sq=norm_sq)

    def _corrected(self, gradient: Tensor) -> Tensor:
        """Returns the gradient in fp32, with pending residuals."""
        wide = gradient if self._wide is None else self._wide.copy_(gradient)
        if self.pending is not None:
            wide.add_(self.pending)
            self.pending = None
        return wide

    def _transmit(self, phase: int) -> None:
        """Steps 2 and 5."""
        if self._work is not None:
            self._work.wait()  # for the sizes
        self._sent = time.perf_counter()
        self._work = self.phases[phase].transmit()

    def _receive(self, phase: int, gradient: Tensor) -> None:
        """Steps 3 and 6."""
        if self._work is not None:
            self._work.wait()  # on CUDA only the side stream waits
        arrived = time.perf_counter()
        self._stats.sending(self._sent, arrived)
        if phase + 1 < len(self.phases):
            target = self._means[phase]
        else:
            target = gradient if self._wide is None else self._wide
        self.phases[phase].finish(target)
        self._stats.add(decode_s=time.perf_counter() - arrived)

    def _finish(self, bucket: BucketInFlight, gradient: Tensor) -> None:
        """Hands the mean back to DDP."""
        if self._wide is not None:
            gradient.copy_(self._wide)
        if self._stats.watch:
            self._stats.add(nonfinite=count_nonfinite(gradient, self._exchange.config.bucket_size))
        self._bucket = self._work = None
        if self._final:
            if bucket.last:
                self._exchange.close_step(bucket.step)
            bucket.future.set_result(bucket.buffer)

    def fail(self, error: BaseException) -> None:
        """Hands an error to the training thread, which waits for the bucket's future."""
        bucket, self._bucket = self._bucket, None
        if bucket is not None and not bucket.future.done():
            bucket.future.set_exception(error)  # type: ignore[arg-type]  # torch's stub is too narrow


@dataclass(frozen=True)
class BucketPlan:
    """How one bucket is exchanged, until DDP rebuilds its buckets or warm-up ends.

    Attributes:
        key: What the plan was made for.
        places: The parameters in the order of the buffer.
        units: The bucket's units in order.
    """

    key: tuple[object, ...]
    places: Sequence[Place]
    units: Sequence[UnitExchange]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters, in the order of the buffer."""
        return tuple(place.name for place in self.places)


class TaskRunner(Protocol):
    """What takes units through their stages."""

    def submit(self, task: Task) -> None:
        """Takes a unit; returns at once."""

    def close(self) -> None:
        """Ends."""


class Report(Protocol):
    """What tells and learns which rank a failure began with."""

    status: str
    handed_over: int

    def explain(self, error: BaseException) -> BaseException:
        """Returns the error that users see for one in the exchange."""

    def report(self, error: BaseException) -> str:
        """Tells that this rank ends by an error; returns what other ranks have to do with it."""

    def close(self) -> None:
        """Ends."""


class Exchange:
    """One rank's side of the exchange: runs its buckets through the phases. Nothing of it is saved.

    Args:
        config: The settings, equal on all ranks.
        groups: How messages travel.
        device: The device of the gradients.
        vary: Whether compressed messages vary in size.
        report: Tells and learns which rank a failure began with.
        runner: From the number of stages of a unit to what takes units through them.

    Attributes:
        stats: The counters.
        plans: The plans by the index of the DDP bucket.
        activity: How failure reports call an exchange, before its number.
        first_lossy_phase: The phase that quantizes this rank's gradient.
        stages_per_phase: 1, or 2 where sizes vary and encoding goes on while they are told.
    """

    def __init__(
        self,
        config: ExchangeConfig,
        groups: ExchangeGroups,
        device: torch.device,
        vary: bool,
        report: Report,
        runner: Callable[[int], TaskRunner],
    ) -> None:
        self.config, self.device, self.stats = config, device, ExchangeStats()
        self.plans: dict[int, BucketPlan] = {}
        self.report, self.activity = report, "gradient exchange of step"
        self._groups, self._counted = groups, 0
        self.first_lossy_phase = int(bool(groups.intra_node))
        self.stages_per_phase = 2 if vary else 1
        self._runner = runner(self.stages_per_phase * groups.phases + 1)

    def plan(
        self,
        index: int,
        key: tuple[object, ...],
        places: Sequence[Place],
        codecs: tuple[Codec, Codec],
        dtype: torch.dtype,
    ) -> BucketPlan:
        """Makes the plan of a bucket: its units, their phases and buffers.

        Args:
            index: The index of the DDP bucket.
            key: What the plan is valid for.
            places: The parameters in the buffer.
            codecs: The codecs of the two phases.
            dtype: The dtype of the gradients.
        """
        config, first = self.config, index * _UNITS_PER_BUCKET
        align = config.bucket_size * self._groups.world_size
        spans = split_units(bucket_span(places), config.unit_numel, align)
        units = [
            UnitExchange(
                self, span, number, build_phases(span, config, self._groups, codecs, self.device), dtype
            )
            for number, span in enumerate(spans, first)
        ]
        self.plans[index] = BucketPlan(key, places, units)
        return self.plans[index]

    def start(self, plan: BucketPlan, buffer: Tensor, step: int, last: bool) -> torch.futures.Future[Tensor]:
        """Starts exchanging a bucket; the future completes with `buffer`, which then holds the mean."""
        cuda = buffer.device.type == "cuda"
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device] if cuda else None)
        # DDP ignores exceptions set on a Python future but not those raised by its callbacks.
        result = future.then(lambda done: done.value())
        ready = torch.cuda.current_stream(buffer.device).record_event() if cuda else None
        bucket = BucketInFlight(future, buffer, step, last, ready)
        self.stats.begin(buffer.numel())
        self.report.status = f"{self.activity} {step}"
        for unit in plan.units:
            self.report.handed_over += 1
            self._runner.submit(unit.begin(bucket, final=unit is plan.units[-1]))
        return result

    def seed(self, step: int, unit: int, phase: int, message: int) -> MessageSeed:
        """Returns the seed of a message, which no other of a run has, with one that all ranks share."""
        groups = self._groups
        number = (unit * groups.phases + phase) * groups.world_size + message
        own = mix_seed(self.config.seed, groups.rank, step, number)
        return MessageSeed(own, mix_seed(self.config.seed, _ALL_RANKS, step, number))

    def close_step(self, step: int) -> None:
        """Closes the counters of a step, whose last gradient is back."""
        sent = self._groups.sent
        self.stats.close(step, sent - self._counted, self._groups.world_size)
        self._counted = sent
        self.report.status = f"work after the {self.activity} {step}"

    def close(self) -> None:
        """Ends the threads."""
        self._runner.close()
        self.report.close()


def connect(
    config: ExchangeConfig,
    codecs: tuple[Codec, Codec],
    group: dist.ProcessGroup | None,
    device: torch.device,
    timeout: timedelta | None,
    facts: Mapping[str, Any],
) -> Exchange:
    """Joins the other ranks: handshake, process groups, threads. A collective call.

    Args:
        config: The settings, equal on all ranks.
        codecs: The codecs of the two phases after warm-up.
        group: The process group whose ranks synchronize; the default group if None.
        device: The device of the gradients.
        timeout: How long the exchange's process groups wait for a peer before they fail; torch's default if
            None.
        facts: Further things that have to be equal on all ranks.

    Returns:
        This rank's side of the exchange.

    Raises:
        ValueError: On every rank, if two ranks disagree.
    """
    ranks = dist.get_process_group_ranks(group)
    name = shake_hands({**_record(config, codecs), **facts}, group, device)
    vary = sizes_vary(codecs)
    # Two NCCL communicators at once may deadlock; one thread and one group per set of ranks cannot.
    groups = process_groups(ranks, config, timeout, shared=device.type == "cuda", vary=vary)
    report = FailureReport(name, ranks, groups.rank, compat.default_store())
    return Exchange(
        config, groups, device, vary, report, lambda stages: Pipeline(stages, device, report.explain)
    )


def sizes_vary(codecs: Sequence[Codec]) -> bool:
    """Returns whether messages of some codec vary in size, so that sizes have to be told."""
    return not all(codec.fixed_size for codec in codecs)


def _record(config: ExchangeConfig, codecs: tuple[Codec, Codec]) -> dict[str, Any]:
    """Returns what the ranks compare before the first message."""
    return config.fields() | {
        "version": __version__,
        "codec": codecs[0].describe(),
        "second_codec": codecs[1].describe(),
    }


def count_nonfinite(values: Tensor, bucket_size: int) -> int:
    """Returns how many runs of `bucket_size` coordinates hold a NaN or an infinity."""
    if bool(torch.isfinite(values.sum())):  # one cheap pass in the ordinary case
        return 0
    places = (~torch.isfinite(values)).nonzero().view(-1)
    return int(torch.unique(places.div(bucket_size, rounding_mode="floor")).numel())
