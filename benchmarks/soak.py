"""``python -m benchmarks.soak``: does a long run stay as it began? Memory, files, threads, time per step.

Trains the digits network on several local ranks with ``nuqsgd``, both monitors, CSV and offline W&B,
and fits a robust line (median of pairwise slopes) to every rank's samples after warm-up. Ends with 1
if something grows. Stopping the process group for a while (SIGSTOP, SIGCONT) does no harm.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.machine import description

_RESULTS = Path(__file__).parent / "results" / "soak.json"
WARM_UP = 0.2
"""Share of the samples that is not judged: caches fill, kernels compile, buffers reach their size."""
LIMITS = {"memory_mb": 1.0, "files": 0.0, "threads": 0.0, "cpu_ms": 0.15, "step_ms": 0.5}
"""Largest growth: MB per 1,000 steps; handles and threads from first to last quarter (medians); relative
drift of the processor time and of the wall-clock time per step over the run. Wall-clock time depends on
what else the machine does, hence its wider limit."""

Sample = dict[str, float]


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the median slope over all pairs of points (Theil-Sen): single outliers do not move it.

    Raises:
        ValueError: With fewer than two points.
    """
    if len(xs) < 2:
        raise ValueError(f"xs: got {len(xs)} points, allowed are 2 or more")
    pairs = itertools.combinations(zip(xs, ys, strict=True), 2)
    return statistics.median((d - b) / (c - a) for (a, b), (c, d) in pairs)


def growth(samples: Sequence[Sample]) -> dict[str, float]:
    """Return how much each quantity grew after warm-up, in the units of :data:`LIMITS`.

    Args:
        samples: One rank's, in order of steps.

    Raises:
        ValueError: With fewer than ten samples, from which nothing can be said.
    """
    if len(samples) < 10:
        raise ValueError(f"samples: got {len(samples)}, allowed are 10 or more: run for longer")
    kept = samples[int(WARM_UP * len(samples)) :]
    steps = [sample["step"] for sample in kept]
    found = {"memory_mb": 1e3 * slope(steps, [sample["memory_mb"] for sample in kept])}
    quarter = max(1, len(kept) // 4)
    for name in ("files", "threads"):
        first, last = (statistics.median(s[name] for s in part) for part in (kept[:quarter], kept[-quarter:]))
        found[name] = last - first
    for name in ("cpu_ms", "step_ms"):
        values = [sample[name] for sample in kept]
        found[name] = slope(steps, values) * (steps[-1] - steps[0]) / statistics.median(values)
    return found


def not_flat(found: dict[str, float]) -> list[str]:
    """Return the names of what grew beyond its limit."""
    return [name for name, limit in LIMITS.items() if not found[name] <= limit]


def run_ranks(ranks: int, seconds: float, every: int, folder: Path) -> None:
    """Train on ``ranks`` processes of this machine, in this process's group.

    Raises:
        RuntimeError: If a rank fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["--seconds", str(seconds), "--every", str(every), "--folder", str(folder)]
    fixed = {"WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    fixed |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.soak_rank", *words],
            env=os.environ | fixed | {"RANK": str(rank), "NODE_RANK": str(rank)},
            cwd=Path(__file__).parent.parent,
        )
        for rank in range(ranks)
    ]
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}")


def soak(ranks: int, seconds: float, every: int) -> dict[str, object]:
    """Run and judge; return what is written to the results."""
    machine = description(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(ranks, seconds, every, Path(folder))
        lines = [Path(folder, f"rank{rank}.jsonl").read_text().splitlines() for rank in range(ranks)]
    samples = [[json.loads(line) for line in part] for part in lines]
    found = [growth(part) for part in samples]
    return {
        "minutes": round(samples[0][-1]["seconds"] / 60, 2),
        "steps": samples[0][-1]["step"],
        "limits": LIMITS,
        "growth": [{name: round(value, 4) for name, value in part.items()} for part in found],
        "not_flat": [not_flat(part) for part in found],
        "machine": machine,
        "samples": samples,
    }


def render(result: dict[str, object]) -> str:
    """Return the table: one row per rank, first and last sample after warm-up, and growth."""
    head = "| rank | MB first, last | MB per 1,000 steps | files | threads "
    head += "| processor ms per step | ms per step |"
    lines = [head, "|---" * 7 + "|"]
    for rank, (part, grew) in enumerate(zip(result["samples"], result["growth"], strict=True)):
        first, last = part[int(WARM_UP * len(part))], part[-1]
        counts = " | ".join(f"{first[n]:.0f}, {last[n]:.0f} ({grew[n]:+.0f})" for n in ("files", "threads"))
        times = " | ".join(
            f"{statistics.median(s[n] for s in part):.1f} ({100 * grew[n]:+.1f} %)"
            for n in ("cpu_ms", "step_ms")
        )
        memory = f"{first['memory_mb']:.1f}, {last['memory_mb']:.1f} | {grew['memory_mb']:+.2f}"
        lines.append(f"| {rank} | {memory} | {counts} | {times} |")
    bad = {rank: names for rank, names in enumerate(result["not_flat"]) if names}
    verdict = f"not flat, by rank: {bad}" if bad else "flat on every rank"
    return "\n".join([*lines, "", f"{result['steps']} steps in {result['minutes']} minutes: {verdict}"])


def main(argv: list[str] | None = None) -> int:
    """Soak, print the table, write JSON; 0 if everything is flat."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="training time; pauses do not count")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--every", type=int, default=50, help="steps between samples")
    parser.add_argument("--output", type=Path, default=_RESULTS)
    options = parser.parse_args(argv)
    result = soak(options.ranks, 60 * options.minutes, options.every)
    print(render(result))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result) + "\n")
    return int(any(result["not_flat"]))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no rank is left behind
    sys.exit(main())
