"""Signals that ask a run to stop, noted down and answered at the end of the step."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn


class RunInterrupted(SystemExit):  # no error: the way out that was asked for
    """Ends the process: 128 + the signal's number on rank 0; 0 on others, rank 0 speaks for all."""


class StopSignals:
    """Notes the first SIGTERM, SIGINT or SIGUSR1 between `watch` and `release`.

    A second SIGINT, that is an impatient Ctrl-C, raises `RunInterrupted` at once: of a KeyboardInterrupt
    Lightning would make exit code 1.

    Attributes:
        received: Number of the noted signal, 0 if none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def watch(self) -> None:
        """Takes the handlers' place; does nothing outside of the main thread, where Python allows none."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        names = ("SIGTERM", "SIGINT", "SIGUSR1")
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            self._before[number] = signal.signal(number, self._note)

    def release(self) -> None:
        """Gives the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            end_now(number)
        self.received = self.received or number


def end_now(number: int) -> NoReturn:
    """Says that a signal ends the run here, with nothing saved; raises `RunInterrupted`."""
    print(f"stopped by {name_of(number)}", file=sys.stderr, flush=True)
    raise RunInterrupted(128 + number)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Answers SIGTERM and SIGINT with `RunInterrupted` wherever no training step has to end first.

    Lightning would end an evaluation, or a fit that has not begun, with exit code 0 or 1, or not at all.
    While training runs, `StopSignals` is in this place.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        end_now(number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def name_of(number: int) -> str:
    """Returns `SIGTERM` for 15."""
    return signal.Signals(number).name
