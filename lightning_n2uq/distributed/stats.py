"""What an exchange counts: bytes at the collective, seconds per activity, errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class StepStats:
    """One synchronised step of this rank. On CUDA the seconds are the host's, which only queues work.

    Attributes:
        step: Number of the step.
        coordinates: Gradient coordinates synchronised.
        sent_bytes: Bytes handed to the collectives for other ranks.
        full_bytes: Bytes an fp32 all-reduce would send, `2 (W-1)/W * 4` per coordinate.
        encode_s: Seconds spent encoding (and, for entropy coding, exchanging sizes).
        decode_s: Seconds spent decoding and averaging.
        exchange_s: Seconds with at least one message under way.
        sync_s: Seconds from the first gradient handed over to the last one returned.
        error_sq: Squared error of what this rank sent, if measured in this step.
        norm_sq: Squared norm of what this rank meant to send, if measured.
        nonfinite: Codec buckets of the result that hold a NaN or inf, if measured.
    """

    step: int = 0
    coordinates: int = 0
    sent_bytes: int = 0
    full_bytes: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0
    exchange_s: float = 0.0
    sync_s: float = 0.0
    error_sq: float = 0.0
    norm_sq: float = 0.0
    nonfinite: int = 0

    @property
    def relative_error(self) -> float | None:
        """Returns `||Q(v) - v||^2 / ||v||^2` of the messages sent, or None if not measured."""
        return self.error_sq / self.norm_sq if self.norm_sq > 0 else None


def busy_seconds(intervals: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals: overlapping messages share the link's time.

    >>> busy_seconds([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)])
    4.0
    """
    total, reached = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


@dataclass
class ExchangeStats:
    """Collects `StepStats` from the stage threads.

    Attributes:
        last: The last complete step, or None before the first.
        watch: Count non-finite buckets of the results.
        measure_every: Measure errors every so many steps; 0 never does (it costs a decode).
    """

    last: StepStats | None = None
    watch: bool = False
    measure_every: int = 0
    _current: StepStats = field(default_factory=StepStats)
    _intervals: list[tuple[float, float]] = field(default_factory=list)
    _began: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def measures(self, step: int) -> bool:
        """Returns whether errors are measured in this step."""
        return self.measure_every > 0 and step % self.measure_every == 0

    def begin(self, coordinates: int) -> None:
        """Note that gradients were handed over."""
        with self._lock:
            self._current.coordinates += coordinates
            if self._began is None:
                self._began = time.perf_counter()

    def add(self, **amounts: float) -> None:
        """Add to sums of the current step, by name."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self._current, name, getattr(self._current, name) + amount)

    def sending(self, start: float, stop: float) -> None:
        """Note that a message was under way from `start` to `stop` (`time.perf_counter`)."""
        with self._lock:
            self._intervals.append((start, stop))

    def close(self, step: int, sent_bytes: int, world_size: int) -> None:
        """End the current step."""
        with self._lock:
            done = self._current
            done.step, done.sent_bytes = step, done.sent_bytes + sent_bytes
            done.full_bytes = 8.0 * (world_size - 1) / world_size * done.coordinates
            done.exchange_s = busy_seconds(self._intervals)
            done.sync_s = time.perf_counter() - (self._began or time.perf_counter())
            self.last, self._current, self._began = done, StepStats(), None
            self._intervals.clear()
