"""Names the rank that a failure began with, by what the ranks write into the job's own store.

A broken connection only tells an address, and a timeout nothing at all. So the first rank that fails raises
an alarm in the store at which the process group met, and from then on every rank's watcher, a thread that
looks for the alarm twice a second, writes its rank's status there. A rank whose status stands still is gone
(its connections broke) or hangs (they timed out); another may be behind; a rank that ends by an error leaves
a notice. Before a failure nothing is written. Only the watcher calls the store, and whoever waits for the
watcher gives up in time, whatever becomes of the store.
"""

from __future__ import annotations

import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch.distributed as dist

from lightning_n2uq.utils.compat import PrefixStore, Store

_QUIET_S, _ALARMED_S = 0.5, 0.1  # between two looks at the store
_GRACE_S = 3.0  # for a peer to write its status, or to say why it closed a connection
_TELLING_S = 2.0  # a rank that hangs cannot be told; a failing one must not wait for it
_ENDING_S = 1.0
_MAX_TEXT, _MAX_PEERS = 300, 8
_FAILED = "gradient exchange failed"
_BREAKS = ("reset by peer", "closed by peer", "Broken pipe", "Connection refused")
_COLLECTIVE = ("timed out", "connection closed", "connection reset", "gloo")


@dataclass(frozen=True)
class RankStatus:
    """What a rank writes about itself once there is an alarm.

    Attributes:
        beat: Counts the writings.
        handed_over: The units of gradients that the rank has handed to the exchange so far.
        text: What it is doing, for example `forward pass of step 7`.
        notice: Why it ends, to be read after `rank 2 `; empty if it does not.
        origin: Whether the failure began there, and not with another rank.
        heard: The ranks whose notices it has read.
    """

    beat: int
    handed_over: int
    text: str
    notice: str
    origin: bool
    heard: Sequence[int]


class FailureReport:
    """This rank's part in finding out which rank failed.

    Args:
        name: The name of the exchange, equal on its ranks and unlike that of any other.
        ranks: The global ranks that take part.
        rank: This one.
        store: The store at which they met.

    Attributes:
        status: What this rank is doing.
        handed_over: The units of gradients that it has handed to the exchange so far.
    """

    def __init__(self, name: str, ranks: Sequence[int], rank: int, store: Store) -> None:
        self.status, self.handed_over = "start", 0
        self._rank, self._peers = rank, [other for other in ranks if other != rank]
        self._store, self._host = PrefixStore(f"failure_report/{name}", store.clone()), _store_host()
        # When the two latest statuses of a rank were read, and the latest; replaced as a whole.
        self._statuses: dict[int, tuple[float, float, RankStatus]] = {}
        self._notice, self._origin, self._beat = "", False, 0
        # How the first collective that failed on any rank ended, and on this one (with the time to say so).
        self._first_end, self._own_end, self._own_end_due = "", "", 0.0
        self._alarm, self._lost, self._looked = False, False, 0.0
        self._news, self._wake, self._closing = threading.Condition(), threading.Event(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="nuqsgd-watcher")
        self._watcher.start()
        # At the interpreter's end, too: a thread that comes back from the store then would abort the process.
        self._end = weakref.finalize(self, _end, self._closing, self._wake, self._watcher)

    def _watch(self) -> None:
        """Looks for the alarm and then for news; nothing else calls the store."""
        try:
            while not self._closing.is_set():
                self._wake.wait(_ALARMED_S if self._alarm else _QUIET_S)
                self._wake.clear()
                if self._alarm or self._store.check(["alarm"]):
                    self._alarm = True
                    self._exchange_news()
        except RuntimeError:  # the store's host is gone
            self._lost = True
        with self._news:
            self._news.notify_all()

    def _exchange_news(self) -> None:
        self._store.set("alarm", "")
        self._learn_the_first_end()
        for rank in self._peers:
            if self._store.check([f"status {rank}"]):
                status = RankStatus(**json.loads(self._store.get(f"status {rank}")))
                _, seen, last = self._statuses.get(rank, (0.0, 0.0, None))
                if last is None or last.beat != status.beat:
                    self._statuses = self._statuses | {rank: (seen, time.monotonic(), status)}
        self._beat += 1
        own = RankStatus(
            self._beat,
            self.handed_over,
            plain(self.status),
            self._notice,
            self._origin,
            list(self._notices()),
        )
        self._store.set(f"status {self._rank}", json.dumps(asdict(own)))
        self._looked = time.monotonic()
        with self._news:
            self._news.notify_all()

    def _learn_the_first_end(self) -> None:
        if self._own_end and time.monotonic() >= self._own_end_due:
            if self._store.add("ends", 1) == 1:
                self._store.set("first end", self._own_end)
            self._own_end = ""
        if not self._first_end and self._store.check(["first end"]):
            self._first_end = self._store.get("first end").decode()

    def suspects(self, error: BaseException | None = None, behind: bool = True) -> str:
        """Returns which ranks failed, are gone, hang or are behind; an empty string if none.

        Ranks that only stopped because of another one are left out where that other one is known. Where a
        connection broke and nobody seems to be why, whoever closed it is about to say so, and is waited for.

        Args:
            error: The error by which a collective of this rank ended, if one did.
            behind: Whether to mention ranks that are merely behind this one.
        """
        broke = any(phrase in str(error) for phrase in _BREAKS)
        began = time.monotonic()
        if error is not None:
            # A rank whose wait times out closes its connections, so a break may be the younger of two ends.
            self._own_end_due = began + (_GRACE_S / 3 if broke else 0.0)
            self._own_end = "break" if broke else "timeout"
        self._wait_until(lambda: self._notices(origin=True) != {} or self._silent(began) == [], _GRACE_S)
        found = self._found(began)
        if broke and not found:
            self._wait_until(lambda: self._notices() != {}, _GRACE_S)
            found = self._found(began)
        return "; ".join(found or (self._behind() if behind else []))

    def _wait_until(self, reached: Callable[[], bool], seconds: float) -> None:
        """Raises the alarm and waits for news from the watcher, at most so long."""
        self._alarm = True
        self._wake.set()
        with self._news:
            self._news.wait_for(lambda: self._lost or reached(), seconds)

    def _notices(self, origin: bool = False) -> dict[int, str]:
        """Returns why other ranks ended; with `origin` only those with which a failure began."""
        return {
            rank: f"rank {rank} {status.notice}"
            for rank, (_, _, status) in sorted(self._statuses.items())
            if status.notice and (status.origin or not origin)
        }

    def _silent(self, since: float) -> list[int]:
        """Returns the ranks that have left no notice and, since then, not written at least twice.

        What is read first may have been written long ago.
        """
        alive = {rank for rank, (before, _, _) in self._statuses.items() if before >= since}
        return [rank for rank in self._peers if rank not in alive | self._notices().keys()]

    def _found(self, since: float) -> list[str]:
        origins, stopped = list(self._notices(origin=True).values()), list(self._notices().values())
        if self._lost:
            return origins or stopped or [f"{self._host} is gone (it had the job's store)"]
        silent = [f"rank {rank} {self._fate()}" for rank in self._silent(since)]
        if origins or len(silent) < len(self._peers):
            return origins or silent or stopped
        if time.monotonic() - self._looked > _GRACE_S / 3:  # the watcher waits for the store
            silent = [f"{self._host} does not answer within {_GRACE_S:g} s (it has the job's store)"]
        alone = ["no other rank can be asked: check this rank's own network"] * (len(self._peers) > 1)
        return silent + alone

    def _fate(self) -> str:
        """Returns what became of a silent rank: connections to one that ended break, others time out."""
        return f"does not answer within {_GRACE_S:g} s" if self._first_end == "timeout" else "is gone"

    def _behind(self) -> list[str]:
        return [
            f"rank {rank} is {self.handed_over - status.handed_over} messages behind: {status.text}"
            for rank, (_, _, status) in sorted(self._statuses.items())
            if status.handed_over < self.handed_over
        ]

    def whereabouts(self) -> str:
        """Returns what the others are doing, for a failure that no rank explains."""
        phrases = [f"rank {rank}: {status.text}" for rank, (_, _, status) in sorted(self._statuses.items())]
        return "; ".join(phrases[:_MAX_PEERS] + ["..."] * (len(phrases) > _MAX_PEERS))

    def tell(self, text: str, origin: bool) -> None:
        """Tells the other ranks why this one ends, and waits a moment until those that listen know.

        Args:
            text: What happened, to be read after `rank 2 `.
            origin: Whether the failure began here.
        """
        deaf = set() if origin else set(self._silent(time.monotonic() - 1.0))
        self._notice, self._origin = plain(text), origin
        self._wait_until(lambda: all(rank in deaf or self._knows(rank) for rank in self._peers), _TELLING_S)

    def _knows(self, rank: int) -> bool:
        return rank in self._statuses and self._rank in self._statuses[rank][2].heard

    def explain(self, error: BaseException) -> BaseException:
        """Returns the error that users see for one in the exchange, having told the other ranks."""
        status = self.status  # before asking, which takes a moment
        who = self.suspects(error) or f"all ranks answer ({self.whereabouts()})"
        self.tell(f"stopped in the {status} because {who}", origin=False)
        return RuntimeError(f"{_FAILED} on rank {self._rank} in the {status}: {who} ({error})")

    def report(self, error: BaseException) -> str:
        """Tells the other ranks why this one ends.

        Args:
            error: The error by which training ends here.

        Returns:
            What is known of the cause on other ranks; empty if the failure began here.
        """
        status = self.status
        if isinstance(error, RuntimeError) and _FAILED in str(error):
            return ""  # explained and told already
        cause = self._cause(error)
        if cause:
            self.tell(f"stopped in the {status} because {cause}", origin=False)
            return f"in the {status} of rank {self._rank}: {cause}"
        self.tell(f"raised {type(error).__name__}: {error} (in the {status})", origin=True)
        return ""

    def _cause(self, error: BaseException) -> str:
        """Returns what other ranks have to do with an error, which only failing collectives raise so."""
        if not isinstance(error, RuntimeError):
            return ""
        # NCCL has a class for it, gloo only words.
        failed = isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _COLLECTIVE)
        suspects = self.suspects(error if failed else None, behind=False)
        return suspects or (f"all ranks answer ({self.whereabouts()})" if failed else "")

    def close(self) -> None:
        """Ends the watcher."""
        self._end()


def _end(closing: threading.Event, wake: threading.Event, watcher: threading.Thread) -> None:
    closing.set()
    wake.set()
    watcher.join(_ENDING_S)


def plain(text: str) -> str:
    """Returns a text as one short line of printable ASCII."""
    line = " ".join(text.split())
    line = "".join(letter if " " <= letter <= "~" else "?" for letter in line)
    return line if len(line) <= _MAX_TEXT else line[: _MAX_TEXT - 3] + "..."


def _store_host() -> str:
    """Returns who hosts the job's store."""
    return "torchrun's agent" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
