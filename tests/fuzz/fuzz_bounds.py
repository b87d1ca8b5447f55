"""What every fuzzed call has to keep: 10 seconds, and 1 GiB of address space on top of what is in use."""

import contextlib
import resource
import signal
from pathlib import Path

SECONDS = 10
MEMORY = 2**30


class TooSlowError(BaseException):
    """No `Exception`, so that no handler takes it for an error of its own."""


def _too_slow(*_):
    raise TooSlowError(f"more than {SECONDS} s")


@contextlib.contextmanager
def limited(memory=MEMORY):
    """Allocations beyond `memory` bytes fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def bounded(seconds=SECONDS, memory=MEMORY):
    """Ends what is inside after `seconds`, too; for the main thread."""
    before = signal.signal(signal.SIGALRM, _too_slow)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with limited(memory):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
