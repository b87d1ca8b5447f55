"""Plots over steps: accuracy, loss, learning rate, entropy, traffic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from lightning_n2uq.report.figure import Figure, axes, style
from lightning_n2uq.report.run_data import Run, Series

CURVES = ("val/*", "test/*", "train/*", "lr-*")
ENTROPY = ("entropy/mean_*", "entropy/penalty", "quant/mean_*", "quant/total_*")
TRAFFIC = ("comm/*",)


def curves(runs: Sequence[Run], patterns: Sequence[str]) -> list[Figure]:
    """Returns a plot of all runs for each metric that matches, in the order of the patterns."""
    names = dict.fromkeys(name for run in runs for name in sorted(run.metrics))
    chosen = dict.fromkeys(n for pattern in patterns for n in names if fnmatchcase(n, pattern))
    return [_curve(runs, name) for name in chosen]


def _curve(runs: Sequence[Run], name: str) -> Figure:
    traces, words = [], []
    for i, run in enumerate(runs):
        if name not in run.metrics:
            continue
        series = run.metrics[name]
        words.append(f"{run.name}: {_in_words(name, series)}")
        shown = series.thinned()
        mode = "lines+markers" if len(shown.steps) < 50 else "lines"
        traces.append(
            {
                "type": "scatter",
                "mode": mode,
                "name": run.name,
                "x": shown.steps,
                "y": shown.values,
                "line": style(i),
            }
        )
    return Figure(f"curve-{name}", name, "; ".join(words), traces, axes("step", name))


def _in_words(name: str, series: Series) -> str:
    finite = [value for value in series.values if not math.isnan(value)]
    if not finite:
        return "never a number"
    if len(finite) == 1:
        return f"{finite[0]:.4g} at step {series.steps[-1]}"
    rising = any(word in name for word in ("acc", "entropy", "ratio"))
    best = max(finite) if rising else min(finite)
    word = "highest" if rising else "lowest"
    step = series.steps[series.values.index(best)]
    return f"from {finite[0]:.4g} to {finite[-1]:.4g}, {word} {best:.4g} at step {step}"
