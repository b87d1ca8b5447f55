"""Plots of one layer: the learned staircase, its thresholds over time, the use of its levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning_n2uq.report import plot_data
from lightning_n2uq.report.figure import COLORS, GREY, Figure, axes, style
from lightning_n2uq.report.layer_record import ActivationRecord, LayerRecord, entropy, shares
from lightning_n2uq.report.run_data import Run

_MOST_LINES = 15  # thresholds drawn over time

Known = Sequence[tuple[int, Run, LayerRecord]]


def layer_plots(runs: Sequence[Run], layer: str) -> list[Figure]:
    """Returns all plots of a layer: staircase and thresholds of each run, then level usage of all runs."""
    known = [(i, run, record) for i, run in enumerate(runs) if (record := run.layers.get(layer)) is not None]
    activations = [(i, run, record.activation) for i, run, record in known if record.activation is not None]
    figures = [_staircase(i, run, layer, activation) for i, run, activation in activations]
    figures += [_thresholds(i, run, layer) for i, run, activation in activations if activation.thresholds]
    usages = [_usage(known, layer, "weight"), _usage(known, layer, "activation")]
    return figures + [figure for figure in usages if figure is not None]


def _staircase(index: int, run: Run, layer: str, activation: ActivationRecord) -> Figure:
    color = COLORS[index % len(COLORS)]
    lines = (
        ("surrogate", plot_data.surrogate_points(activation), {"color": GREY, "width": 1}),
        ("staircase", plot_data.staircase_points(activation), {"color": color, "width": 2}),
    )
    traces: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": line}
        for name, (x, y), line in lines
        if x
    ]
    x, y, width = plot_data.input_bars(activation)
    bars = {"x": x, "y": y, "width": width, "yaxis": "y2", "opacity": 0.6, "marker": {"color": color}}
    traces.append({"type": "bar", "name": "inputs", **bars})
    layout = axes(plot_data.input_label(activation), "output")
    layout["yaxis"]["domain"] = [0.32, 1]
    layout["yaxis2"] = {"domain": [0, 0.24], "title": {"text": "share"}, "tickformat": ".1~%"}
    layout["xaxis"]["anchor"] = "y2"
    words = f"{run.name}: {activation.bits} bits"
    if activation.thresholds:
        places = ", ".join(f"{t:.3g}" for t in activation.thresholds[:_MOST_LINES])
        words += f", thresholds at {places}, {activation.widths_at_floor} widths at the floor"
    words += (
        f"; {activation.clipped_low:.0%} of the inputs clipped below, {activation.clipped_high:.0%} above"
    )
    title = f"Staircase: {run.name}"
    return Figure(f"staircase-{index}-{layer}", title, words, traces, layout, layer, run=index)


def _thresholds(index: int, run: Run, layer: str) -> Figure:
    """Returns the thresholds over time; where the bit width changes, new lines begin."""
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for snapshot in run.snapshots:
        record = snapshot.layers.get(layer)
        values = record.activation.thresholds if record is not None and record.activation is not None else []
        for k, value in enumerate(values[:_MOST_LINES]):
            name = f"T{k + 1}" if len(values) <= _MOST_LINES else f"T{k + 1} of {len(values)}"
            x, y = lines.setdefault(name, ([], []))
            x.append(snapshot.step)
            y.append(value)
    traces = [
        {"type": "scatter", "mode": "lines+markers", "name": name, "x": x, "y": y, "line": style(index)}
        for name, (x, y) in lines.items()
    ]
    moved = ", ".join(f"{name} from {y[0]:.3g} to {y[-1]:.3g}" for name, (_, y) in lines.items())
    layout = axes("optimizer step", "threshold (scaled input)")
    key, title = f"thresholds-{index}-{layer}", f"Thresholds: {run.name}"
    words = f"{run.name}: {moved}"
    return Figure(key, title, words, traces, layout, layer, run=index, keyed=False)


def _usage(known: Known, layer: str, kind: Literal["weight", "activation"]) -> Figure | None:
    traces, words = [], []
    for i, run, record in known:
        part = record.weight if kind == "weight" else record.activation
        if part is None:
            continue
        dead = sum(count == 0 for count in part.usage)
        words.append(f"{run.name}: {entropy(part.usage):.3g} of {part.bits} bits, {dead} dead levels")
        bars = {"x": list(range(len(part.usage))), "y": shares(part.usage)}
        color = {"color": COLORS[i % len(COLORS)]}
        traces.append({"type": "bar", "name": run.name, "meta": i, **bars, "marker": color})
    if not traces:
        return None
    layout = axes("level", f"share of the {kind}s")
    layout["yaxis"]["tickformat"] = ".1~%"
    title = f"Level usage: {kind}s"
    return Figure(f"usage-{kind}-{layer}", title, "; ".join(words), traces, layout, layer)
