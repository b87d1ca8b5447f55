"""Runs a Python function on the threads of torch's own OpenMP team.

libgomp's threads spin for a while after every parallel loop of torch, so that the next one starts at once. A
pool of other threads would share the cores with them. Inside the team the spinning threads do the work.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch

_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_forked = False


def usable() -> bool:
    """Returns whether torch's team can be used: libgomp's can, by the process that it was started in."""
    return not _forked and _library() is not None


def run_team(work: Callable[[], None], threads: int) -> None:
    """Calls `work()` once on every thread of a team, and waits for all.

    Args:
        work: Has to cope with being called by fewer threads than asked for.
        threads: Size of the team; another one than torch's would make libgomp end threads and start new ones.

    Raises:
        RuntimeError: If the team is not `usable`.
        BaseException: Whatever `work` raised first.
    """
    library = _library()
    if _forked or library is None:
        raise RuntimeError("torch's OpenMP threads cannot be used in this process")
    failures: list[BaseException] = []

    def region(_: int | None) -> None:
        try:
            work()
        except BaseException as error:  # nothing may unwind through libgomp
            failures.append(error)

    library.GOMP_parallel(_REGION(region), None, threads, 0)
    if failures:
        raise failures[0]


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Returns the libgomp that torch has loaded; None where torch uses another OpenMP or none."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    for name in [*map(str, bundled), *([] if bundled else ["libgomp.so.1"])]:
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            library.GOMP_parallel.argtypes = (_REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        except (OSError, AttributeError):  # not loaded, or without that function
            continue
        library.GOMP_parallel.restype = None
        return library
    return None


def _remember_fork() -> None:
    """Remembers that this is a forked child, where the team's threads do not exist."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remember_fork)
