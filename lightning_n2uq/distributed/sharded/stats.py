"""What is counted of a step of sharded training."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from lightning_n2uq.distributed.stats import ExchangeStats, StepStats, busy_seconds


@dataclass
class ShardedStats(ExchangeStats):
    """Counts the bytes and times of all collectives of a step.

    A step's `full_bytes` are those that the same collectives send in full precision, `coordinates` the
    gradient coordinates that this rank has reduced, and `sync_s` the time spent in the collectives.

    Attributes:
        sent_by: The bytes that this rank sent in the last step, by `reduce-scatter`, `all-gather` and
            `all-reduce`.
    """

    sent_by: Counter[str] = field(default_factory=Counter)
    _sent_by: Counter[str] = field(default_factory=Counter)

    def count(self, kind: str, sent: float) -> None:
        """Notes bytes that were sent in a collective of a kind."""
        self.add(sent_bytes=sent)
        self._sent_by[kind] += round(sent)

    def close_step(self, step: int) -> None:
        """Ends the current step."""
        with self._lock:
            done = self._current
            done.step, done.exchange_s = step, busy_seconds(self._intervals)
            done.sync_s = done.encode_s + done.exchange_s + done.decode_s
            self.last, self._current = done, StepStats()
            self.sent_by, self._sent_by = self._sent_by, Counter()
            self._intervals.clear()
