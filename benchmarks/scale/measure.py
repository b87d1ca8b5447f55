"""What the model is held against: real ranks over links of limited speed. Needs root and iproute2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.netlab.__main__ import run
from benchmarks.scale.error import table
from benchmarks.scale.local_ranks import volumes

TIMED = (
    "ddp",
    "ddp_fp16",
    "nuqsgd_8bit",
    "nuqsgd",
    "nuqsgd_3bit",
    "nuqsgd_2bit",
    "nuqsgd_all_gather",
    "ddp_powersgd",
)


def times(hosts: int, mbit: int = 100, numel: int = 4_000_000, steps: int = 2) -> list[dict[str, Any]]:
    """Return seconds and bytes of every method between ``hosts`` hosts of one rank."""
    return run(mbit, hosts, list(TIMED), numel, steps, limit=300.0)


def speeds() -> dict[str, Any]:
    """Return :func:`~benchmarks.scale.speeds.measure_speeds`, from a fresh process of one thread."""
    code = (
        "import json; from benchmarks.scale.speeds import measure_speeds; print(json.dumps(measure_speeds()))"
    )
    one = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | one
    )
    return json.loads(done.stdout.splitlines()[-1])


def merge(path: Path, key: str, value: object) -> None:
    """Replace one topic of the results file."""
    results = json.loads(path.read_text()) if path.exists() else {}
    results[key] = value
    results["cores"] = os.cpu_count()
    if key == "speeds":
        results["speeds_source"] = "measured: processor time of one thread"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def measure(parts: list[str], path: Path) -> None:
    """Measure some parts and save each as soon as it is there.

    Args:
        parts: ``speeds``, ``error``, ``times:HOSTS``, ``bytes:HOSTS``.
        path: The results file.

    Raises:
        ValueError: If a part is unknown.
    """
    known = {"speeds": lambda _: speeds(), "error": lambda _: table(), "times": times, "bytes": volumes}
    for part in parts:
        name, _, hosts = part.partition(":")
        if name not in known or (name in ("times", "bytes")) != hosts.isdecimal():
            raise ValueError(f"measure: got {part!r}, allowed are speeds, error, times:HOSTS, bytes:HOSTS")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `timeout` leaves no network behind
    for part in parts:
        name, _, hosts = part.partition(":")
        merge(path, part, known[name](int(hosts or 0)))
        print(f"{part}: saved", flush=True)
