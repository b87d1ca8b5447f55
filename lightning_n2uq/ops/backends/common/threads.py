"""Runs a compiled kernel on as many threads as torch uses.

`nogil` kernels called from Python on torch's own threads (see `openmp`), or on a pool where those cannot be
used, instead of numba's own parallel loops: numba's default threading layer aborts the process when two
threads launch kernels at once (autograd does), its OpenMP layer dies in forked children, and compiling
parallel loops takes several times as long. Here calls may overlap, forked children start their own pool, and
ranges are contiguous, so results cannot depend on how many threads there are.
"""

import functools
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from lightning_n2uq.ops.backends.common import openmp

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_owner: tuple[int, int] = (-1, 0)  # process id, number of workers


def run_ranges(kernel: Callable[[int, int], None], total: int, smallest: int) -> None:
    """Calls `kernel(start, stop)` on ranges that cover `0 .. total`, in parallel.

    Args:
        kernel: Releases the GIL while it works; writes only what belongs to its range.
        total: Number of work items.
        smallest: Ranges are not made smaller than this, since waking a thread costs some 20 microseconds.
    """
    threads = max(1, min(torch.get_num_threads(), total // smallest))
    if threads == 1:
        kernel(0, total)
        return
    borders = [total * index // threads for index in range(threads + 1)]
    ranges = list(itertools.pairwise(borders))
    if threads == torch.get_num_threads() and openmp.usable():
        openmp.run_team(functools.partial(_take_ranges, kernel, deque(ranges)), threads)
        return
    pool = _workers(threads - 1)
    futures = [pool.submit(kernel, *one) for one in ranges[1:]]
    kernel(*ranges[0])
    for future in futures:
        future.result()


def _take_ranges(kernel: Callable[[int, int], None], ranges: deque[tuple[int, int]]) -> None:
    """Works until no range is left, whoever else takes from them; the team may be smaller than asked for."""
    while True:
        try:
            start, stop = ranges.popleft()
        except IndexError:
            return
        kernel(start, stop)


def _workers(count: int) -> ThreadPoolExecutor:
    """Returns the process's pool of at least `count` threads, which do not survive a fork."""
    global _pool, _pool_owner
    with _lock:
        owner, size = _pool_owner
        if _pool is None or owner != os.getpid() or size < count:
            _pool = ThreadPoolExecutor(count, thread_name_prefix="lightning_n2uq")
            _pool_owner = (os.getpid(), count)
        return _pool


def _forget_after_fork() -> None:
    """Replaces the lock: one that another thread held at the fork would never be released in the child."""
    global _lock, _pool
    _lock = threading.Lock()
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
