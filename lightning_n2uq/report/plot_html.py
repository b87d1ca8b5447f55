"""A plot's HTML: heading, legend, the place to draw in, caption. Legends stand above plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from lightning_n2uq.report.figure import Figure, style

_DASH_ARRAYS = {"solid": "none", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3"}
_LINE = Markup(
    '<svg class="swatch" width="28" height="10" aria-hidden="true"><line x1="0" y1="5" x2="28" y2="5" '
    'stroke="{}" stroke-width="{}" stroke-dasharray="{}"/></svg>'
)
_BAR = Markup(
    '<svg class="swatch" width="12" height="12" aria-hidden="true">'
    '<rect width="12" height="12" rx="2" fill="{}" fill-opacity="{}"/></svg>'
)


def plot(figure: Figure) -> Markup:
    """Returns the place of a plot on the page, with everything but the drawing."""
    return Markup(
        '<figure aria-labelledby="t-{key}" aria-describedby="c-{key}"{run}>'
        '<h3 id="t-{key}">{title}{metric}</h3>'
        '{legend}<div class="plot" data-figure="{key}" style="height:{height}px"></div>'
        '<figcaption id="c-{key}">{summary}</figcaption></figure>'
    ).format(
        key=figure.key,
        run="" if figure.run is None else Markup(' data-run="{}"').format(figure.run),
        title=figure.title,
        metric=Markup(" <code>{}</code>").format(figure.metric) if figure.metric else "",
        legend=_legend(figure),
        height=int(figure.layout.get("height", 340)),
        summary=figure.summary,
    )


def runs_legend(names: Sequence[str]) -> Markup:
    """Returns the runs and their lines; of several, each is a button that hides it and shows it again."""
    items = [(name, _line(style(i))) for i, name in enumerate(names)]
    if len(items) == 1:
        return Markup("<li>{}{}</li>").format(items[0][1], items[0][0])
    button = Markup(
        '<li><button type="button" class="run" data-run="{}" aria-pressed="true">{}{}</button></li>'
    )
    return Markup("").join(button.format(i, line, name) for i, (name, line) in enumerate(items))


def _legend(figure: Figure) -> Markup:
    if not figure.keyed or len(figure.traces) < 2:
        return Markup("")
    items = (
        Markup("<li{}>{}{}</li>").format(_of_run(trace), _swatch(trace), trace["name"])
        for trace in figure.traces
    )
    return Markup('<ul class="legend" aria-hidden="true">{}</ul>').format(Markup("").join(items))


def _of_run(trace: dict[str, Any]) -> Markup:
    return Markup(' data-run="{}"').format(trace["meta"]) if "meta" in trace else Markup("")


def _swatch(trace: dict[str, Any]) -> Markup:
    if trace["type"] == "bar":
        return _BAR.format(trace["marker"]["color"], trace.get("opacity", 1))
    return _line(trace["line"])


def _line(line: dict[str, Any]) -> Markup:
    return _LINE.format(line["color"], line["width"], _DASH_ARRAYS[line.get("dash", "solid")])
