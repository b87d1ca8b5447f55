"""The processes that Lightning's launcher starts: none is left over, and a lost one is named.

The launcher's own observer kills the command the moment that it sees a child fail, before rank 0 can say why
it stops, and nothing ends the children of a command that is killed itself. Here both sides watch each other,
and each leaves the other a moment to say in its own words what happened.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from lightning_n2uq.cli.rank_failures import EXIT_CODE

_LAUNCHER = "N2UQ_LAUNCHER"  # the process id of rank 0, for the children that it starts
_LOOK_S = 0.3
_GRACE_S = 12.0  # for a rank to notice by itself that another is gone, and to say so
_ENDING_S = 60.0  # for one that has noticed, to close what it has open

ending = threading.Event()
"""Set when this process is about to say why it ends."""


def announce_launcher() -> None:
    """Tells children that will be started who their launcher is."""
    os.environ[_LAUNCHER] = str(os.getpid())


def watch_launcher() -> None:
    """In a child of the launcher, ends the process soon after the launcher has ended, however it did."""
    launcher = os.environ.get(_LAUNCHER, "")
    if os.environ.get("LOCAL_RANK", "0") == "0" or not launcher.isdecimal() or os.name != "posix":
        return
    threading.Thread(target=_end_with, args=(int(launcher),), daemon=True, name="launcher-watcher").start()


def _end_with(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_LOOK_S)
    _leave_time()
    _say(f"rank {os.environ['LOCAL_RANK']}: the process that started it ({launcher}) is gone")
    os._exit(EXIT_CODE)


def observe_children(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends this process soon after a child has failed: in place of the launcher's own observer."""
    threading.Thread(target=_end_after, args=(children,), daemon=True, name="child-watcher").start()


def _end_after(children: Sequence[subprocess.Popen[bytes]]) -> None:
    while not any(child.poll() for child in children):
        if all(child.returncode == 0 for child in children):
            return
        time.sleep(_LOOK_S)
    rank, code = next((rank, c.returncode) for rank, c in enumerate(children, 1) if c.returncode)
    _leave_time()
    for child in children:
        child.kill()
    if code < 0:
        _say(f"rank {rank} was killed by {signal.Signals(-code).name}")
    elif code not in (2, EXIT_CODE):  # those have said it in one line
        _say(f"rank {rank} ended with exit code {code}")
    os._exit(code if code > 0 else EXIT_CODE)


def _leave_time() -> None:
    """Waits until the main thread should have ended the process by itself."""
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline and not ending.is_set():
        time.sleep(_LOOK_S)
    if ending.is_set():
        time.sleep(_ENDING_S)


def _say(text: str) -> None:
    print(f"n2uq: error: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
