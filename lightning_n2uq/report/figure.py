"""A plot of the page: traces and layout for plotly, a caption, and the same in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""One per run (Okabe and Ito: told apart with any colour vision)."""

DASHES = ("solid", "dash", "dot", "dashdot")
"""Beside the colour, so that runs differ without it too."""


@dataclass
class Figure:
    """One plot.

    Attributes:
        key: Identifier, unique on the page.
        title: Heading of the plot.
        summary: What it shows, in words and numbers: caption, and text for screen readers.
        traces: Plotly traces.
        layout: Plotly layout; colours of the theme are added by the page.
        layer: Name of the layer it belongs to, or empty for the whole network.
    """

    key: str
    title: str
    summary: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    layer: str = ""

    def spec(self) -> dict[str, Any]:
        """What the page's script draws; NaN becomes null."""
        return {"data": plain(self.traces), "layout": plain(self.layout)}


def style(index: int) -> dict[str, Any]:
    """Line of the `index`-th run."""
    return {"color": COLORS[index % len(COLORS)], "dash": DASHES[index % len(DASHES)], "width": 2}


def axes(x: str, y: str) -> dict[str, Any]:
    """Layout with titled axes."""
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}


def plain(value: Any) -> Any:  # noqa: ANN401 -- any plain value
    """The value with floats rounded to six significant digits and NaN as None, fit for JSON."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
