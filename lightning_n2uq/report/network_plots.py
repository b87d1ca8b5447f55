"""Plots of the whole network: entropy by layer and step, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning_n2uq.report.figure import Figure, axes
from lightning_n2uq.report.layer_record import LayerRecord, entropy, shares
from lightning_n2uq.report.plot_data import entropy_range
from lightning_n2uq.report.run_data import Run
from lightning_n2uq.report.words import STAGES

Kind = Literal["weight", "activation"]
MOST_COUNTS = 20
"""Classes up to which a confusion matrix has numbers in its cells."""

MOST_PIXELS = 900
THEME_SCALE = "theme"
"""A colour scale that the page replaces by that of its theme."""

_KINDS: tuple[Kind, ...] = ("weight", "activation")


def entropy_maps(runs: Sequence[Run]) -> list[Figure]:
    """Returns the entropy by layer and step, for weights and activations of every run."""
    figures = []
    for kind in _KINDS:
        found = [_entropy_map(i, run, kind) for i, run in enumerate(runs) if run.snapshots]
        figures += _with_common_colors([figure for figure in found if figure is not None])
    return figures


def _with_common_colors(figures: list[Figure]) -> list[Figure]:
    """Gives heat maps one scale, so that runs can be compared by eye."""
    values = [v for figure in figures for row in figure.traces[0]["z"] for v in row if v is not None]
    if values:
        low, high = entropy_range(values)
        for figure in figures:
            figure.traces[0].update(zmin=low, zmax=high)
    return figures


def _entropy_map(index: int, run: Run, kind: Kind) -> Figure | None:
    rows: dict[str, list[float | None]] = {
        name: [_entropy(snapshot.layers.get(name), kind) for snapshot in run.snapshots]
        for name, layer in run.layers.items()
        if _entropy(layer, kind) is not None
    }
    if not rows:
        return None
    last = {name: row[-1] for name, row in rows.items() if row[-1] is not None}
    lowest = min(last, key=lambda name: last[name])
    words = (
        f"{run.name}: mean {sum(last.values()) / len(last):.3g} bits at the end, "
        f"lowest {last[lowest]:.3g} in {lowest}"
    )
    steps = [str(snapshot.step) for snapshot in run.snapshots]
    trace = {
        "type": "heatmap",
        "x": steps,
        "y": list(rows),
        "z": list(rows.values()),
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": "bits"}},
    }
    layout = _matrix_layout("optimizer step", "layer", len(rows))
    title = f"Entropy of {kind}s: {run.name}"
    return Figure(f"entropy-{kind}-{index}", title, words, [trace], layout, run=index)


def _entropy(layer: LayerRecord | None, kind: Kind) -> float | None:
    part = None if layer is None else layer.weight if kind == "weight" else layer.activation
    return None if part is None else entropy(part.usage)


def confusion_matrices(runs: Sequence[Run]) -> list[Figure]:
    """Returns the confusion matrices of every run; their rows are true classes."""
    return [
        _confusion(i, run, stage, matrix)
        for i, run in enumerate(runs)
        for stage, matrix in run.confusion.items()
    ]


def _confusion(index: int, run: Run, stage: str, matrix: list[list[float]]) -> Figure:
    total = sum(map(sum, matrix))
    right = sum(row[i] for i, row in enumerate(matrix))
    wrong = [
        (value, i, j) for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j and value > 0
    ]
    named = class_labels(run, len(matrix))
    classes = [name.removeprefix("class ") for name in named] if not run.class_names else named
    words = f"{run.name}, {STAGES.get(stage, stage)}: {right:g} of {total:g} right"
    if wrong:
        value, true, predicted = max(wrong)
        words += f"; most often {named[true]} was taken for {named[predicted]}, {_times(value)}"
    trace: dict[str, Any] = {"type": "heatmap", "x": classes, "y": classes, "z": list(map(shares, matrix))}
    trace |= {"zmin": 0, "zmax": 1, "colorscale": THEME_SCALE, "customdata": matrix}
    trace["text"] = [[f"{count:g}" if count else "" for count in row] for row in matrix]
    trace["hovertemplate"] = "%{y} taken for %{x}: %{customdata} (%{z:.1%})<extra></extra>"
    trace["colorbar"] = {"title": {"text": "share of<br>true class"}, "tickformat": ".0%"}
    if len(matrix) <= MOST_COUNTS:
        trace["texttemplate"] = "%{text}"
    layout = _matrix_layout("predicted class", "true class", len(matrix))
    title = f"Confusion, {STAGES.get(stage, stage)}: {run.name}"
    return Figure(f"confusion-{stage}-{index}", title, words, [trace], layout, run=index)


def _times(count: float) -> str:
    return "once" if count == 1 else f"{count:g} times"


def class_labels(run: Run, count: int) -> list[str]:
    """Returns the names of the classes, or `class 0`, `class 1` and so on where the run knows none."""
    return run.class_names if len(run.class_names) == count else [f"class {i}" for i in range(count)]


def _matrix_layout(x: str, y: str, rows: int) -> dict[str, Any]:
    layout = axes(x, y)
    layout["yaxis"] |= {"type": "category", "autorange": "reversed", "automargin": True}
    layout["xaxis"] |= {"type": "category"}
    layout["yaxis"]["title"]["standoff"] = 12
    layout["height"] = min(max(360, 20 * rows + 140), MOST_PIXELS)
    return layout
