"""A plot of the page: traces and layout for plotly, a caption, and the same in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""One per run (Okabe and Ito: told apart with any colour vision)."""

DASHES = ("solid", "dash", "dot", "dashdot")
"""Beside the colour, so that runs differ without it too."""

GREY = "#8a9099"
"""Of what is there for comparison; it can be told from the background of either theme."""


@dataclass
class Figure:
    """One plot.

    Attributes:
        key: An identifier that is unique on the page.
        title: The heading of the plot.
        summary: What it shows, in words and numbers: the caption, and the text for screen readers.
        traces: Plotly's traces.
        layout: Plotly's layout; the page adds the colours of the theme.
        layer: The name of the layer it belongs to; empty for the whole network.
        metric: The name of the metric that it shows, as loggers have it; empty for another plot.
        run: The number of the run that it belongs to; None for all of them.
        keyed: Whether the plot has a legend, which stands above it.
    """

    key: str
    title: str
    summary: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    layer: str = ""
    metric: str = ""
    run: int | None = None
    keyed: bool = True

    def spec(self) -> dict[str, Any]:
        """Returns what the page's script draws; NaN becomes null."""
        return {"data": plain(self.traces), "layout": plain(self.layout)}


def style(index: int) -> dict[str, Any]:
    """Returns the line style of the `index`-th run."""
    return {"color": COLORS[index % len(COLORS)], "dash": DASHES[index % len(DASHES)], "width": 2}


def axes(x: str, y: str) -> dict[str, Any]:
    """Returns a layout with titled axes."""
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}


def plain(value: Any) -> Any:  # noqa: ANN401 -- any plain value
    """Returns a value fit for JSON: floats with six significant digits, NaN as None."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
