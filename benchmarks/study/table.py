"""The study's table, from its JSON files alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study import results
from benchmarks.study.plan import Study, runs_by_row

_FURTHER = (("MB per exchange", "sent_bytes", 1e-6, 3), ("oscillating [%]", "oscillating", 100.0, 2))
"""Columns of figures that not every study has: title, key, factor, decimals."""


def finished(study: Study, output: Path) -> dict[str, list[dict[str, Any]]]:
    """Figures of all finished runs by row, in the order of the plan."""
    found = {
        row: [figures for run in runs if (figures := results.load(output, study, run)) is not None]
        for row, runs in runs_by_row(study)
    }
    return {row: runs for row, runs in found.items() if runs}


def mean_and_error(runs: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Mean of the last test accuracies in percent, and its standard error (0 with one seed)."""
    values = [100 * run["test_acc"] for run in runs]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def markdown(study: Study, output: Path) -> str:
    """A row per config: mean and standard error over the seeds, and each seed's accuracy, in percent.

    The fifth column compares with the first row. Where gradients' bytes or oscillations were counted a column
    has them.
    """
    rows = finished(study, output)
    first = study.runs[0].row
    further = [
        (title, key, factor, digits)
        for title, key, factor, digits in _FURTHER
        if any(run.get(key) is not None for runs in rows.values() for run in runs)
    ]
    lines = [
        f"| row | accuracy [%] | standard error | per seed | against {first} | optimizer |"
        + "".join(f" {title} |" for title, *_ in further),
        "|---|---|---|---|---|---|" + "---|" * len(further),
    ]
    base = mean_and_error(rows[first])[0] if first in rows else None
    for row, runs in rows.items():
        mean, error = mean_and_error(runs)
        scatter = f"{error:.2f}" if len(runs) > 1 else "-"
        each = ", ".join(f"{100 * run['test_acc']:.2f}" for run in runs)
        against = "-" if base is None or row == first else f"{mean - base:+.2f}"
        label = f"`{study.configs.name}/{row}`" if runs[0]["config"] == row else row
        lines.append(f"| {label} | {mean:.2f} | {scatter} | {each} | {against} | {runs[0]['optimizer']} |")
        for _, key, factor, digits in further:
            counted = [run[key] for run in runs if run.get(key) is not None]
            lines[-1] += f" {statistics.mean(counted) * factor:.{digits}f} |" if counted else " - |"
    return "\n".join(lines)


def status(study: Study, output: Path) -> str:
    """One line per run: its figures, or that it is to be done."""
    lines = []
    for run in study.runs:
        figures = results.load(output, study, run)
        text = (
            "to do" if figures is None else f"{100 * figures['test_acc']:.2f} % in {figures['seconds']:.0f} s"
        )
        lines.append(f"{run.name:24} {text}")
    return "\n".join(lines)
