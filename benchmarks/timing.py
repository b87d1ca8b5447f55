"""Timing side by side: all candidates take turns, so that whatever slows the machine slows them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Samples:
    """Seconds of every round of one candidate: wall clock, and processor time of all threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def take_turns(
    candidates: dict[str, Callable[[], object]],
    seconds: float,
    device: torch.device,
    rounds: int = 100,
    least: int = 3,
    pause: float = 0.0,
) -> dict[str, Samples]:
    """Runs every candidate once to warm up, then all in turn until the time is used up.

    Args:
        candidates: name and what to run.
        seconds: time budget of the measured rounds.
        device: where they run; a GPU is waited for.
        rounds: most rounds.
        least: rounds that are run whatever time they take.
        pause: seconds of rest before every turn.
    """
    for run in candidates.values():
        run()
    result = {name: Samples() for name in candidates}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - begin > seconds:
            break
        for name, run in candidates.items():
            time.sleep(pause)
            wall, cpu = _timed(run, device)
            result[name].wall.append(wall)
            result[name].cpu.append(cpu)
    return result


def _timed(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    _wait(device)
    cpu, wall = time.process_time(), time.perf_counter()
    kept = run()
    _wait(device)
    times = time.perf_counter() - wall, time.process_time() - cpu
    del kept
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(result: dict[str, Samples], base: str) -> dict[str, dict[str, object]]:
    """Milliseconds and ratio to `base` of every candidate.

    `ratio` is the median over the rounds of the ratio within a round, `ratio_range` its quartiles;
    `cpu_ratio` the same of processor time, which a busy machine disturbs less.
    """
    return {name: _figures(samples, result[base]) for name, samples in result.items()}


def _figures(samples: Samples, base: Samples) -> dict[str, object]:
    ratios = [a / b for a, b in zip(samples.wall, base.wall, strict=True)]
    cpu = [a / b for a, b in zip(samples.cpu, base.cpu, strict=True) if b > 0]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "rounds": len(ratios),
        "ms_median": round(1e3 * statistics.median(samples.wall), 4),
        "ms_min": round(1e3 * min(samples.wall), 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_range": [round(low, 4), round(high, 4)],
        "cpu_ratio": round(statistics.median(cpu), 4) if cpu else None,
    }


def table(title: str, figures: dict[str, dict[str, object]]) -> str:
    """A text table of `summary`'s result."""
    lines = [title]
    for name, f in figures.items():
        low, high = f["ratio_range"]
        lines.append(
            f"  {name:<34} {f['ms_median']:>10.3f} ms   {f['ratio']:>7.3f}x "
            f"[{low:.3f}, {high:.3f}]   processor time {f['cpu_ratio']}x"
        )
    return "\n".join(lines)
