"""Put the page together: one HTML document with its data, styles, scripts and plotly inside.

Names, numbers and texts of a run's files may come from a stranger. They reach the document through `Markup`
only, which escapes whatever it is not told to be HTML; the content security policy lets the browser run the
page's own scripts and no other, and load nothing.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files

from markupsafe import Markup, escape

from lightning_n2uq.report import curves, tables
from lightning_n2uq.report.facts import facts_table
from lightning_n2uq.report.figure import Figure
from lightning_n2uq.report.layer_plots import layer_plots
from lightning_n2uq.report.network_plots import confusion_matrices, entropy_maps
from lightning_n2uq.report.plot_html import plot, runs_legend
from lightning_n2uq.report.run_data import Run
from lightning_n2uq.utils.extras import how_to_install

_NOTHING = Markup("")
_NO_SNAPSHOTS = Markup(
    "<p>These runs kept no snapshots of their quantizers: add the callback "
    "<code>QuantizationMonitor</code> to a run's config to see them here.</p>"
)


def render(runs: Sequence[Run]) -> str:
    """Returns the page's text.

    Raises:
        ValueError: plotly, whose script goes into the page, is not installed.
    """
    figures: list[Figure] = []
    sections = [
        _section("runs", "Runs", facts_table(runs)),
        _plots("curves", "Accuracy and loss", curves.curves(runs, curves.CURVES), figures),
        _layers(runs, figures),
        _plots(
            "entropy",
            "Entropy",
            [*entropy_maps(runs), *curves.curves(runs, curves.ENTROPY)],
            figures,
            _zeros(curves.zeros(runs, curves.ENTROPY)),
        ),
        _plots("confusion", "Confusion", confusion_matrices(runs), figures, tables.classes_table(runs)),
        _plots(
            "traffic",
            "Traffic",
            curves.curves(runs, curves.TRAFFIC),
            figures,
            _zeros(curves.zeros(runs, curves.TRAFFIC)),
        ),
        _section("config", "Config", _configs(runs)),
    ]
    shown = [section for section in sections if section]
    data = {"figures": {figure.key: figure.spec() for figure in figures}}
    plotly, script = _plotly(), _asset("page.js")
    values: dict[str, str | Markup] = {
        "TITLE": ", ".join(run.name for run in runs),
        "POLICY": f"{_POLICY}; script-src {_hash(plotly)} {_hash(script)}",
        "STYLE": Markup(_asset("page.css")),
        "NAVIGATION": Markup("").join(_link(section) for section in shown),
        "LEGEND": runs_legend([run.name for run in runs]),
        "SECTIONS": Markup("").join(html for _, _, html in shown),
        "DATA": Markup(json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")),
        "PLOTLY": Markup(plotly),
        "SCRIPT": Markup(script),
    }
    return _fill(_asset("page.html"), values)


_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
)


def _hash(script: str) -> str:
    """Returns a script's hash as a source of the content security policy."""
    return f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"


Section = tuple[str, str, Markup]
"""Identifier, heading, HTML."""


def _section(key: str, title: str, body: Markup) -> Section:
    html = Markup('<section id="{0}" aria-labelledby="{0}-title"><h2 id="{0}-title">{1}</h2>{2}</section>')
    return key, title, html.format(key, title, body)


def _link(section: Section) -> Markup:
    return Markup('<li><a href="#{}">{}</a></li>').format(*section[:2])


def _plots(
    key: str, title: str, found: Sequence[Figure], figures: list[Figure], before: Markup = _NOTHING
) -> Section | None:
    """Returns a section of plots, with HTML before them, or None where the runs have no data for it."""
    figures.extend(found)
    plots = Markup('<div class="grid">{}</div>').format(Markup("").join(map(plot, found)))
    return _section(key, title, before + plots) if found or before else None


def _zeros(names: Sequence[str]) -> Markup:
    """Returns a line that names what was counted and is 0 throughout."""
    line = Markup("<p>Zero throughout: {}.</p>")
    return line.format(", ".join(names)) if names else _NOTHING


def _layers(runs: Sequence[Run], figures: list[Figure]) -> Section | None:
    names = list(dict.fromkeys(name for run in runs for name in run.layers))
    if not names:
        return _section("layers", "Layers", _NO_SNAPSHOTS)
    groups = Markup("")
    for i, name in enumerate(names):
        found = layer_plots(runs, name)
        figures.extend(found)
        hidden = Markup(" hidden" if i else "")
        group = Markup('<div class="grid layer" data-layer="{}"{}>{}</div>')
        groups += group.format(name, hidden, Markup("").join(map(plot, found)))
    options = tables.joined("<option>{}</option>", names)
    chooser = Markup('<p><label>Layer <select id="layer">{}</select></label> <span role="status"></span></p>')
    overview = Markup("").join(tables.layers_table(run) for run in runs if run.snapshots)
    return _section("layers", "Layers", overview + chooser.format(options) + groups)


def _configs(runs: Sequence[Run]) -> Markup:
    text = Markup('<details><summary>config.yaml of {}</summary><pre tabindex="0">{}</pre></details>')
    texts = Markup("").join(text.format(run.name, run.config) for run in runs if run.config)
    compared = tables.config_table(runs) if sum(bool(run.config) for run in runs) > 1 else Markup("")
    return compared + texts or Markup("<p>These runs kept no config.yaml.</p>")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ValueError(
            f"report: plotly is not installed, install it with {how_to_install('report')}"
        ) from error
    text: str = get_plotlyjs()
    return text


def _asset(name: str) -> str:
    return files("lightning_n2uq.report").joinpath(name).read_text(encoding="utf-8")


def _fill(template: str, values: dict[str, str | Markup]) -> str:
    """Fills in all values in one pass, so that none is searched for another's mark; escapes what is text."""
    parts = template.split("@@")
    return "".join(escape(values[part]) if i % 2 else part for i, part in enumerate(parts))
