"""Kernels run on torch's own threads: no others are started beside them."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from lightning_n2uq.ops.backends.common import openmp
from lightning_n2uq.ops.backends.common.threads import run_ranges

needs_team = pytest.mark.skipif(not openmp.usable(), reason="torch here has no libgomp")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


NO_NEW_THREADS = """
import os, threading, torch
from lightning_n2uq.ops.backends.common.threads import run_ranges
torch.set_num_threads(2)
torch.ones(1_000_000).exp_()  # starts torch's team
before = set(os.listdir("/proc/self/task"))
met, seen = threading.Barrier(2, timeout=30), []
def work(start, stop):
    met.wait()  # both ranges at once: two threads or a timeout
    seen.append((start, stop, str(threading.get_native_id())))
for _ in range(3):
    run_ranges(work, 10, 1)
assert sorted(pair[:2] for pair in seen) == [(0, 5)] * 3 + [(5, 10)] * 3, seen
assert {one[2] for one in seen} <= before, (seen, before)
assert set(os.listdir("/proc/self/task")) == before
"""


@pytest.mark.integration
@needs_team
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_no_thread_is_started_beside_torchs():
    subprocess.run([sys.executable, "-c", NO_NEW_THREADS], check=True, timeout=120)


def test_an_error_of_any_range_reaches_the_caller():
    for bad in (0, 4):

        def work(start: int, stop: int, bad: int = bad) -> None:
            if start == bad:
                raise ValueError(f"range {start} to {stop}")

        with pytest.raises(ValueError, match=f"range {bad} to {bad + 4}"):
            run_ranges(work, 8, 1)


def test_overlapping_calls_cover_every_item_once():
    done = [[0] * 100 for _ in range(4)]

    def caller(mine: list[int]) -> None:
        def work(start: int, stop: int) -> None:
            for i in range(start, stop):
                mine[i] += 1

        for _ in range(20):
            run_ranges(work, len(mine), 1)

    threads = [threading.Thread(target=caller, args=(mine,)) for mine in done]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [[20] * 100] * 4


@pytest.mark.integration
@needs_team
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_wait_for_threads_it_lacks():
    script = (
        "import os, torch; from lightning_n2uq.ops.backends.common import openmp; torch.set_num_threads(2)\n"
    )
    script += "openmp.run_team(lambda: None, 2); child = os.fork()\n"
    script += "if child == 0: os._exit(int(openmp.usable()))\n"
    script += "assert os.waitpid(child, 0)[1] == 0 and openmp.usable()"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
