"""Tables of the page: runs, layers, and where configs differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from lightning_n2uq.report.network_plots import class_labels
from lightning_n2uq.report.run_data import Run
from lightning_n2uq.report.words import STAGES

_LAYER_COLUMNS = {
    "weight_entropy": "weight entropy [bits]",
    "activation_entropy": "activation entropy [bits]",
    "weight_dead_levels": "dead weight levels",
    "activation_dead_levels": "dead activation levels",
    "widths_at_floor": "widths at the floor",
    "weight_changed": "weights that changed level [%]",
    "activation_clipped_high": "inputs clipped above [%]",
    "scale_in": "input scale",
    "scale_out": "output scale",
}
_SHARES = ("weight_changed", "activation_clipped_high")
_ALARMING = ("weight_dead_levels", "activation_dead_levels", "widths_at_floor")  # above 0


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Markup:
    """Returns an HTML table; whatever is no `Markup` is escaped. The first cell of each row is its header."""
    head = joined('<th scope="col">{}</th>', columns)
    cells = [(row[0], joined("<td>{}</td>", row[1:])) for row in rows]
    body = Markup("").join(Markup('<tr><th scope="row">{}</th>{}</tr>').format(*row) for row in cells)
    return Markup(
        '<div class="scroll" role="region" tabindex="0" aria-label="{0}"><table><caption>{0}</caption>'
        "<thead><tr>{1}</tr></thead><tbody>{2}</tbody></table></div>"
    ).format(caption, head, body)


def joined(element: str, values: Iterable[object]) -> Markup:
    """Returns one element per value, one after the other; values are escaped unless they are `Markup`."""
    return Markup("").join(Markup(element).format(value) for value in values)


def classes_table(runs: Sequence[Run]) -> Markup:
    """Returns the accuracy per class of every run: of its test if there was one, else of validation."""
    judged = [(run, stage, matrix) for run in runs for stage, matrix in _judged(run)]
    labels = list(dict.fromkeys(label for run, _, m in judged for label in class_labels(run, len(m))))
    columns: list[dict[str, str]] = []
    for run, _, matrix in judged:
        cells = map(_class_accuracy, range(len(matrix)), matrix)
        columns.append(dict(zip(class_labels(run, len(matrix)), cells, strict=True)))
    heads = [f"{run.name}, {STAGES.get(stage, stage)}" for run, stage, _ in judged]
    rows = [[label, *(column.get(label, "-") for column in columns)] for label in labels]
    return table("Accuracy per class", ["class", *heads], rows) if rows else Markup("")


def _judged(run: Run) -> list[tuple[str, list[list[float]]]]:
    stages: tuple[str, ...] = ("test", "val")
    return [(stage, run.confusion[stage]) for stage in stages if stage in run.confusion][:1]


def _class_accuracy(number: int, row: Sequence[float]) -> str:
    total = sum(row)
    return f"{100 * row[number] / total:.1f}% of {total:g}" if total else "no images"


def layers_table(run: Run) -> Markup:
    """Returns a row per layer of the last snapshot; what needs a look is marked in colour and in words."""
    rows = []
    for layer in run.layers.values():
        scalars = layer.scalars()
        cells = [_cell(name, scalars.get(name)) for name in _LAYER_COLUMNS]
        bits = "/".join(str(part.bits) if part else "-" for part in (layer.weight, layer.activation))
        rows.append([layer.name, bits, *cells])
    columns = ["layer", "bits (W/A)", *_LAYER_COLUMNS.values()]
    return table(f"Layers of {run.name} at step {run.snapshots[-1].step}", columns, rows)


def config_table(runs: Sequence[Run]) -> Markup:
    """Returns the settings in which the runs differ."""
    flat = [run.settings for run in runs]
    keys = sorted({key for settings in flat for key in settings})
    differing = [key for key in keys if len({repr(settings.get(key)) for settings in flat}) > 1]
    rows = [[key, *(settings.get(key, "-") for settings in flat)] for key in differing]
    if not rows:
        return Markup("<p>The configs do not differ.</p>")
    return table("Settings that differ", ["setting", *(run.name for run in runs)], rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _cell(name: str, value: float | None) -> str:
    if value is not None and name in _SHARES:
        return f"{100 * value:.2f}"
    if name in _ALARMING and value:
        return Markup('<strong class="alarm">{:g} (look)</strong>').format(value)
    return _number(value)
