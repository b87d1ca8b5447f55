"""Plots over steps: accuracy, loss, learning rate, entropy, traffic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from lightning_n2uq.report.figure import Figure, axes, style
from lightning_n2uq.report.run_data import Run, Series
from lightning_n2uq.report.words import in_words, is_better_high, is_share, number, sentence

CURVES = ("val/*", "train/*", "lr-*")
ENTROPY = ("entropy/mean_*", "entropy/penalty", "quant/mean_*", "quant/total_*")
TRAFFIC = ("comm/*",)


def curves(runs: Sequence[Run], patterns: Sequence[str]) -> list[Figure]:
    """Returns a plot of all runs for each metric that matches, in the order of the patterns.

    Metrics that are 0 throughout are left to `zeros`.
    """
    return [_curve(runs, name) for name in _chosen(runs, patterns) if not _is_zero(runs, name)]


def zeros(runs: Sequence[Run], patterns: Sequence[str]) -> list[str]:
    """Returns, in words, the metrics that match and are 0 at every step of every run."""
    return [in_words(name) for name in _chosen(runs, patterns) if _is_zero(runs, name)]


def _chosen(runs: Sequence[Run], patterns: Sequence[str]) -> list[str]:
    names = dict.fromkeys(name for run in runs for name in sorted(run.metrics))
    return list(dict.fromkeys(n for pattern in patterns for n in names if fnmatchcase(n, pattern)))


def _is_zero(runs: Sequence[Run], name: str) -> bool:
    return not any(value != 0 for run in runs if name in run.metrics for value in run.metrics[name].values)


def _curve(runs: Sequence[Run], name: str) -> Figure:
    traces, words = [], []
    for i, run in enumerate(runs):
        if name not in run.metrics:
            continue
        series = run.metrics[name]
        words.append(f"{run.name}: {_course(name, series)}")
        shown = series.thinned()
        mode = "lines+markers" if len(shown.steps) < 50 else "lines"
        line = {"x": shown.steps, "y": shown.values, "line": style(i)}
        traces.append({"type": "scatter", "mode": mode, "name": run.name, "meta": i, **line})
    title = sentence(in_words(name))
    layout = axes("optimizer step", title.partition(" (")[0])
    layout["yaxis"]["exponentformat"] = "power" if name.startswith("lr") else "SI"
    if is_share(name):
        layout["yaxis"] |= {"tickformat": ".1~%", "hoverformat": ".2%"}
    return Figure(f"curve-{name}", title, "; ".join(words), traces, layout, metric=name)


def _course(name: str, series: Series) -> str:
    finite = [value for value in series.values if not math.isnan(value)]
    if not finite:
        return "never a number"
    if len(finite) == 1:
        return f"{number(name, finite[0])} at step {series.steps[-1]}"
    rising = is_better_high(name)
    best = max(finite) if rising else min(finite)
    word = "highest" if rising else "lowest"
    step = series.steps[series.values.index(best)]
    ends = f"from {number(name, finite[0])} to {number(name, finite[-1])}"
    return f"{ends}, {word} {number(name, best)} at step {step}"
