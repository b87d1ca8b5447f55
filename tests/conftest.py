"""Settings shared by all tests: seeded, bounded, two threads at most, no variables of ranks left behind."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# One thread per worker: the suite runs as many workers as there are cores, and idle OpenMP threads spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
torch.set_num_threads(1)
settings.register_profile(
    "seeded",
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("seeded")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


RANK_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK", "RANK")


@pytest.fixture(autouse=True)
def _no_ranks_left() -> Iterator[None]:
    """Lightning's launcher sets these in the process that starts ranks; later tests would take it for one."""
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.hookimpl(hookwrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports and collects without garbage collections, which find nothing and take a fifth of the time.

    The million objects of what was imported are left out of later ones.
    """
    gc.disable()
    yield
    gc.enable()
    gc.freeze()


# Folders of tests that start processes and wait for them.
WAITING = {"faults", "distributed", "strategies", "checkpointing"}
# Files of tests that share the job of `test_exchange.py`.
READERS = {"test_exchange_values", "test_local_rounds"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with files named `ranks`: they fork the worker itself, where autograd must not have threads yet.

    Those that wait for processes come next, since the longest would otherwise run last, alone. Files that
    read what the job of another has found come at the end: one worker waits for it, the others go on.
    """
    items.sort(
        key=lambda item: (
            item.path.stem in READERS,
            "ranks" not in item.path.stem,
            WAITING.isdisjoint(item.path.parts),
        )
    )


# Why a test may be skipped where STRICT_SKIPS is set: what no installation can bring to the machine.
ALLOWED_SKIPS = (
    "needs a GPU",
    "there is a GPU",
    "is not beside this checkout",  # shared data
    "is not in the shared data folder",
    "no memory for",
    "mounting a small disk needs root",
    "this system lets not even root mount",
    "network namespaces need root",
    "network namespaces are not allowed here",
    "Python 3.10 has no TOML reader",
)


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("STRICT_SKIPS") or reporter is None:
        return
    skipped = [report for report in reporter.stats.get("skipped", []) if not hasattr(report, "wasxfail")]
    refused = [r.nodeid for r in skipped if not any(reason in str(r.longrepr) for reason in ALLOWED_SKIPS)]
    if refused:
        names = ", ".join(refused)
        reporter.write_line(f"\nSTRICT_SKIPS: {len(refused)} skipped that should run: {names}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
