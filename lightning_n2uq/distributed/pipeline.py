"""Stages as threads joined by first-in-first-out queues: the order in which DDP hands over its buckets.

DDP calls the hook in the same bucket order on every rank, and each stage handles units strictly in
that order. Follow-up collectives therefore start in one order everywhere, which collectives started
from completion callbacks do not: callbacks run whenever a rank's message happens to arrive.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Protocol

import torch

_ENDING_S = 2.0  # a thread that waits for a broken network longer than that is left behind


class Task(Protocol):
    """Something that moves through the stages."""

    def run(self, stage: int) -> None:
        """Do the work of one stage; may block."""

    def fail(self, error: BaseException) -> None:
        """Learn that this task will not finish."""


class Pipeline:
    """Runs every task through `stages` stages, in the order of submission.

    Args:
        stages: Number of stages.
        device: With a CUDA device all stages share one thread and one side stream: kernels and NCCL
            collectives only queue up there, so nothing is gained by more threads, and one issuing
            thread keeps one order over all communicators, without which NCCL may deadlock.
            On CPU every stage is a thread, so that encoding overlaps with the network.
        explain: Turns the first error into the one that users see (it may ask peers who is missing).
    """

    def __init__(
        self, stages: int, device: torch.device, explain: Callable[[BaseException], BaseException]
    ) -> None:
        self._explain = explain
        self._broken = False
        self._error: BaseException | None = None  # explained; a moment after `_broken`
        self._live: list[Task] = []
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        groups = [range(stages)] if self._stream is not None else [range(i, i + 1) for i in range(stages)]
        self._queues: list[SimpleQueue[Task | None]] = [SimpleQueue() for _ in groups]
        self._threads = [
            threading.Thread(target=self._loop, args=(index, group), daemon=True, name=f"nuqsgd-{index}")
            for index, group in enumerate(groups)
        ]
        for thread in self._threads:
            thread.start()
        # At the interpreter's end, too: a thread that frees a tensor then would abort the process.
        self._end = weakref.finalize(self, _end_threads, self._queues[0], self._threads)

    def submit(self, task: Task) -> None:
        """Append a task. After a failure it fails at once."""
        with self._lock:
            error = self._error
            if error is None:
                self._live.append(task)
        if error is not None:
            task.fail(error)
        elif not self._broken:
            self._queues[0].put(task)

    def close(self) -> None:
        """Wait a moment for the threads, which end after what is queued."""
        self._end()

    def _loop(self, index: int, stages: range) -> None:
        with torch.cuda.stream(self._stream):  # no effect with None
            while True:
                task = self._queues[index].get()
                if task is not None and not self._broken:
                    self._advance(task, stages, last=index + 1 == len(self._queues))
                if index + 1 < len(self._queues):
                    self._queues[index + 1].put(task)
                if task is None:
                    return
                del task  # and the gradients it holds, before waiting for the next

    def _advance(self, task: Task, stages: range, last: bool) -> None:
        try:
            for stage in stages:
                task.run(stage)
            if last:
                with self._lock:
                    self._live.remove(task)
        except BaseException as error:  # a dying thread would leave the training thread waiting for ever
            self._stop(error)

    def _stop(self, error: BaseException) -> None:
        """Fail everything under way: the training thread may be waiting for any of it."""
        with self._lock:
            if self._broken:
                return
            self._broken = True
        explained = self._explain(error)
        with self._lock:
            self._error = explained
            live, self._live = self._live, []
        for task in live:
            task.fail(explained)


def _end_threads(queue: SimpleQueue[Task | None], threads: Sequence[threading.Thread]) -> None:
    queue.put(None)
    deadline = time.monotonic() + _ENDING_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
