"""Signals that ask a run to stop, noted down and answered at the end of the step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """Notes the first SIGTERM, SIGINT or SIGUSR1 between `watch` and `release`.

    A second SIGINT, that is an impatient Ctrl-C, raises KeyboardInterrupt at once.

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
            raise KeyboardInterrupt
        self.received = self.received or number


def name_of(number: int) -> str:
    """Returns `SIGTERM` for 15."""
    return signal.Signals(number).name
