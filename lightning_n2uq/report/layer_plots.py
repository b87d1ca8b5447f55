"""Plots of one layer: the learned staircase, its thresholds over time, the use of its levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_n2uq.report.figure import COLORS, Figure, axes, style
from lightning_n2uq.report.layer_record import ActivationRecord, entropy, shares
from lightning_n2uq.report.run_data import Run
from lightning_n2uq.report.staircase_points import staircase_points, surrogate_points

_MOST_LINES = 15  # thresholds drawn over time


def layer_plots(runs: Sequence[Run], layer: str) -> list[Figure]:
    """All plots of a layer: a staircase per run, then thresholds and level usage with all runs."""
    known = [(i, run, record) for i, run in enumerate(runs) if (record := run.layer(layer)) is not None]
    figures = [
        _staircase(i, run, layer, ActivationRecord(**record["activation"]))
        for i, run, record in known
        if record["activation"] is not None
    ]
    figures += [_thresholds(i, run, layer) for i, run, record in known if _has_thresholds(record)]
    figures += [
        figure for kind in ("weight", "activation") if (figure := _usage(known, layer, kind)) is not None
    ]
    return figures


def _staircase(index: int, run: Run, layer: str, activation: ActivationRecord) -> Figure:
    x, y = staircase_points(activation)
    color = COLORS[index % len(COLORS)]
    lines = [("staircase", (x, y), {"color": color, "width": 2})]
    surrogate = surrogate_points(activation)
    if surrogate is not None:
        lines.insert(0, ("surrogate", surrogate, {"color": "gray", "width": 1}))
    traces: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "lines", "name": name, "x": points[0], "y": points[1], "line": line}
        for name, points, line in lines
    ]
    traces.append(_inputs(activation, color))
    layout = axes("scaled input" if activation.thresholds else "input", "output")
    layout["yaxis"]["domain"] = [0.32, 1]
    layout["yaxis2"] = {"domain": [0, 0.24], "title": {"text": "share"}}
    layout["xaxis"]["anchor"] = "y2"
    places = ", ".join(f"{t:.3g}" for t in activation.thresholds[:_MOST_LINES])
    words = f"{run.name}: {activation.bits} bits"
    if places:
        words += f", thresholds at {places}, {activation.widths_at_floor} widths at the floor"
    words += (
        f"; {activation.clipped_low:.0%} of the inputs clipped below, {activation.clipped_high:.0%} above"
    )
    return Figure(f"staircase-{index}-{layer}", f"Staircase: {run.name}", words, traces, layout, layer)


def _inputs(activation: ActivationRecord, color: str) -> dict[str, Any]:
    bins = len(activation.histogram)
    width = (activation.high - activation.low) / bins
    middle = [activation.low + (i + 0.5) * width for i in range(bins)]
    return {
        "type": "bar",
        "name": "inputs",
        "x": middle,
        "y": shares(activation.histogram),
        "width": width,
        "yaxis": "y2",
        "opacity": 0.6,
        "marker": {"color": color},
    }


def _has_thresholds(record: dict[str, Any]) -> bool:
    return record["activation"] is not None and bool(record["activation"]["thresholds"])


def _thresholds(index: int, run: Run, layer: str) -> Figure:
    """Thresholds over time; a bit width that changes begins new lines."""
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for snapshot in run.snapshots:
        for record in snapshot["layers"]:
            if record["name"] != layer or not _has_thresholds(record):
                continue
            values = record["activation"]["thresholds"]
            for k, value in enumerate(values[:_MOST_LINES]):
                name = f"T{k + 1}" if len(values) <= _MOST_LINES else f"T{k + 1} of {len(values)}"
                x, y = lines.setdefault(name, ([], []))
                x.append(snapshot["step"])
                y.append(value)
    traces = [
        {"type": "scatter", "mode": "lines+markers", "name": name, "x": x, "y": y, "line": style(index)}
        for name, (x, y) in lines.items()
    ]
    moved = ", ".join(f"{name} from {y[0]:.3g} to {y[-1]:.3g}" for name, (_, y) in lines.items())
    layout = axes("step", "threshold (scaled input)")
    layout["showlegend"] = False
    return Figure(
        f"thresholds-{index}-{layer}",
        f"Thresholds: {run.name}",
        f"{run.name}: {moved}",
        traces,
        layout,
        layer,
    )


def _usage(known: Sequence[tuple[int, Run, dict[str, Any]]], layer: str, kind: str) -> Figure | None:
    traces, words = [], []
    for i, run, record in known:
        if record[kind] is None:
            continue
        usage = record[kind]["usage"]
        dead = sum(count == 0 for count in usage)
        words.append(f"{run.name}: {entropy(usage):.3g} of {record[kind]['bits']} bits, {dead} dead levels")
        levels = list(range(len(usage)))
        color = {"color": COLORS[i % len(COLORS)]}
        traces.append({"type": "bar", "name": run.name, "x": levels, "y": shares(usage), "marker": color})
    if not traces:
        return None
    title = f"Level usage: {kind}s"
    return Figure(f"usage-{kind}-{layer}", title, "; ".join(words), traces, axes("level", "share"), layer)
