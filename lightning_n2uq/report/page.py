"""Put the page together: one HTML document with its data, styles, scripts and plotly inside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from itertools import cycle

from lightning_n2uq.report import curves, tables
from lightning_n2uq.report.figure import COLORS, Figure
from lightning_n2uq.report.layer_plots import layer_plots
from lightning_n2uq.report.network_plots import confusion_matrices, entropy_maps
from lightning_n2uq.report.run_data import Run

_NO_SNAPSHOTS = (
    "These runs kept no snapshots of their quantizers: add the callback "
    "<code>QuantizationMonitor</code> to a run's config to see them here."
)


def render(runs: Sequence[Run]) -> str:
    """Returns the page's text.

    Raises:
        ValueError: plotly, whose script goes into the page, is not installed.
    """
    figures: list[Figure] = []
    sections = [
        _section("runs", "Runs", tables.runs_table(runs)),
        _plots("curves", "Accuracy and loss", curves.curves(runs, curves.CURVES), figures),
        _layers(runs, figures),
        _plots("entropy", "Entropy", [*entropy_maps(runs), *curves.curves(runs, curves.ENTROPY)], figures),
        _plots("confusion", "Confusion", confusion_matrices(runs), figures),
        _plots("traffic", "Traffic", curves.curves(runs, curves.TRAFFIC), figures),
        _section("config", "Config", _configs(runs)),
    ]
    shown = [section for section in sections if section]
    data = {"figures": {figure.key: figure.spec() for figure in figures}}
    values = {
        "TITLE": escape(", ".join(run.name for run in runs)),
        "STYLE": _asset("page.css"),
        "NAVIGATION": "".join(_link(section) for section in shown),
        "LEGEND": _legend(runs),
        "SECTIONS": "".join(text for _, _, text in shown),
        "DATA": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        "PLOTLY": _plotly(),
        "SCRIPT": _asset("page.js"),
    }
    return _fill(_asset("page.html"), values)


Section = tuple[str, str, str]
"""Identifier, heading, HTML."""


def _section(key: str, title: str, body: str) -> Section:
    html = (
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>{body}</section>'
    )
    return key, title, html


def _link(section: Section) -> str:
    return f'<li><a href="#{section[0]}">{section[1]}</a></li>'


def _plots(key: str, title: str, found: Sequence[Figure], figures: list[Figure]) -> Section | None:
    """Returns a section of plots, or None where the runs have no data for it."""
    figures.extend(found)
    return _section(key, title, f'<div class="grid">{"".join(map(_plot, found))}</div>') if found else None


def _plot(figure: Figure) -> str:
    key, summary = escape(figure.key, quote=True), escape(figure.summary)
    height = figure.layout.get("height", 360)
    return (
        f'<figure aria-labelledby="t-{key}" aria-describedby="c-{key}">'
        f'<h3 id="t-{key}">{escape(figure.title)}</h3>'
        f'<div class="plot" data-figure="{key}" style="height:{height}px"></div>'
        f'<figcaption id="c-{key}">{summary}</figcaption></figure>'
    )


def _layers(runs: Sequence[Run], figures: list[Figure]) -> Section | None:
    names = list(dict.fromkeys(name for run in runs for name in run.layers))
    if not names:
        return _section("layers", "Layers", f"<p>{_NO_SNAPSHOTS}</p>")
    groups = []
    for i, name in enumerate(names):
        found = layer_plots(runs, name)
        figures.extend(found)
        hidden = "" if i == 0 else " hidden"
        plots = "".join(map(_plot, found))
        groups.append(
            f'<div class="grid layer" data-layer="{escape(name, quote=True)}"{hidden}>{plots}</div>'
        )
    options = "".join(f"<option>{escape(name)}</option>" for name in names)
    chooser = f'<p><label>Layer <select id="layer">{options}</select></label> <span role="status"></span></p>'
    overview = "".join(tables.layers_table(run) for run in runs if run.snapshots)
    return _section("layers", "Layers", overview + chooser + "".join(groups))


def _configs(runs: Sequence[Run]) -> str:
    texts = "".join(
        f"<details><summary>config.yaml of {escape(run.name)}</summary>"
        f'<pre tabindex="0">{escape(run.config)}</pre></details>'
        for run in runs
        if run.config
    )
    compared = tables.config_table(runs) if sum(bool(run.config) for run in runs) > 1 else ""
    return compared + texts or "<p>These runs kept no config.yaml.</p>"


def _legend(runs: Sequence[Run]) -> str:
    return "".join(
        f'<li><span class="swatch" style="background:{color}"></span>{escape(run.name)}</li>'
        for run, color in zip(runs, cycle(COLORS), strict=False)
    )


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ValueError(
            "report: plotly is not installed, install it with pip install 'lightning_n2uq[report]'"
        ) from error
    text: str = get_plotlyjs()
    return text


def _asset(name: str) -> str:
    return files("lightning_n2uq.report").joinpath(name).read_text(encoding="utf-8")


def _fill(template: str, values: dict[str, str]) -> str:
    """Fills in all values in one pass, so that none is searched for another's mark."""
    parts = template.split("@@")
    return "".join(values[part] if i % 2 else part for i, part in enumerate(parts))
