"""Figures of what the quantizers have learned, as matplotlib figures (imported when one is drawn).

They use `matplotlib.figure.Figure` and no pyplot: no global state, no window system.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_n2uq.report import plot_data
from lightning_n2uq.report.layer_record import ActivationRecord, LayerRecord, shares

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STAIRCASE, _SURROGATE, _FILL = "#1f5fa8", "#d0662a", "#9fb4c8"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def staircase_figure(name: str, activation: ActivationRecord) -> Figure:
    """Draws the learned staircase over the surrogate, the input's histogram beneath (as in N2UQ, Fig. 4)."""
    figure = _figure(5, 4.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    if activation.widths:
        upper.plot(*plot_data.surrogate_points(activation), color=_SURROGATE, linewidth=1, label="surrogate")
    upper.plot(*plot_data.staircase_points(activation), color=_STAIRCASE, linewidth=1.5, label="staircase")
    for threshold in activation.thresholds:
        upper.axvline(threshold, color=_FILL, linewidth=0.5)
    upper.set(title=name, ylabel="output")
    upper.legend(loc="upper left", fontsize="small", frameon=False)
    middles, heights, width = plot_data.input_bars(activation)
    lower.bar(middles, heights, width=width, color=_FILL)
    lower.set(xlabel=plot_data.input_label(activation), ylabel="share")
    return figure


def usage_figure(records: Sequence[LayerRecord]) -> Figure:
    """Draws level usage, one row of bars per layer, weights left and activations right."""
    figure = _figure(8, max(2.0, 0.45 * len(records)))
    columns = figure.subplots(len(records), 2, squeeze=False)
    for row, record in zip(columns, records, strict=True):
        for axes, part in zip(row, (record.weight, record.activation), strict=True):
            usage = shares(part.usage) if part is not None else []
            axes.bar(range(len(usage)), usage, color=_STAIRCASE)
            axes.set(xticks=[], yticks=[], ylim=(0, max([1e-9, *usage])))
        row[0].set_ylabel(record.name, rotation=0, ha="right", va="center", fontsize="x-small")
    columns[0][0].set_title("weights", fontsize="small")
    columns[0][1].set_title("activations", fontsize="small")
    return figure


def entropy_map(names: Sequence[str], steps: Sequence[int], values: Sequence[Sequence[float]]) -> Figure:
    """Draws entropy by layer (rows, input at the top) and step (columns); `values` is `[steps][layers]`."""
    import numpy as np

    figure = _figure(8, max(2.0, 0.25 * len(names) + 1))
    axes = figure.subplots()
    table = np.asarray(values).T
    low, high = plot_data.entropy_range(table.ravel().tolist())
    image = axes.pcolormesh(np.arange(len(steps) + 1), np.arange(len(names) + 1), table, vmin=low, vmax=high)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize="x-small")
    ticks = np.unique(np.linspace(0, len(steps) - 1, 6).round().astype(int))
    axes.set_xticks(ticks + 0.5, [str(steps[i]) for i in ticks])
    axes.set(xlabel="step")
    figure.colorbar(image, label="entropy [bits]")
    return figure
