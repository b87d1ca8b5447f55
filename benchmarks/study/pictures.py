"""The study's pictures, from its JSON files alone; they need matplotlib."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.plan import Study
from benchmarks.study.table import finished, mean_and_error

_QUANTIZED = re.compile(r"(?P<method>\w+)_w(?P<bits>\d)a(?P=bits)(?P<change>.*)")
_CODEC = re.compile(r"(?P<method>.+?)(, (?P<bits>\d) bits?)?")

Points = dict[str, list[tuple[float, float, float]]]
"""By the name of a line: place on the horizontal axis, mean accuracy and its standard error, in percent."""


def draw_all(study: Study, output: Path, folder: Path) -> list[Path]:
    """Draw what the figures allow: curves, accuracy by bits, accuracy against bytes; returns the files."""
    rows = finished(study, output)
    made = [_curves(rows, folder / f"study_{study.name}.svg")]
    bits = by_bits(rows)
    if any(len(points) > 1 for points in bits.values()):
        level = mean_and_error(rows["float"])[0] if "float" in rows else None
        place = folder / f"study_{study.name}_bits.svg"
        made.append(_lines({"": bits}, "bits of weights and activations", place, level=level))
    sent = by_bytes(rows)
    if sent:
        place = folder / f"study_{study.name}_bytes.svg"
        made.append(_lines(sent, "MB that a rank sends per step", place, logarithmic=True))
    return made


def by_bits(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Points:
    """Accuracy by method and bits, of rows named `METHOD_wBaB` with or without a change."""
    found: Points = {}
    for row, runs in rows.items():
        match = _QUANTIZED.fullmatch(row)
        if match:
            points = found.setdefault(match["method"] + match["change"], [])
            points.append((float(match["bits"]), *mean_and_error(runs)))
    return {name: sorted(points) for name, points in found.items()}


def by_bytes(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Points]:
    """Accuracy against megabytes per step by network and codec, of rows named `NETWORK, CODEC, B bits`."""
    found: dict[str, Points] = {}
    for row, runs in rows.items():
        network, _, codec = row.partition(", ")
        sent = [run["sent_bytes"] for run in runs if run.get("sent_bytes")]
        match = _CODEC.fullmatch(codec)
        if sent and match and runs[0]["config"] == network:
            points = found.setdefault(network, {}).setdefault(match["method"], [])
            points.append((statistics.mean(sent) / 1e6, *mean_and_error(runs)))
    return {network: {name: sorted(p) for name, p in points.items()} for network, points in found.items()}


def by_epoch(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[tuple[int, float]]]:
    """Epoch and mean test accuracy in percent, by row; epochs count on from those of a row started from."""
    found = {}
    for row, runs in rows.items():
        start = rows.get(runs[0]["start"])
        before = start[0]["epochs"] if start else 0
        curves = zip(*(run["curves"]["val/acc"] for run in runs), strict=True)
        found[row] = [
            (epoch, 100 * statistics.mean(values)) for epoch, values in enumerate(curves, before + 1)
        ]
    return found


def by_width(rows: Iterable[str]) -> dict[str, list[str]]:
    """The rows of each panel of curves: those that are not quantized, then by bits."""
    found: dict[str, list[str]] = {}
    for row in rows:
        match = _QUANTIZED.fullmatch(row)
        found.setdefault(f"{match['bits']} bits" if match else "float", []).append(row)
    return dict(sorted(found.items(), key=lambda item: (item[0] != "float", item[0])))


def _curves(rows: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path:
    """Test accuracy by epoch: a line per row, a panel per bit width."""
    curves = by_epoch(rows)
    panels = by_width(rows)
    figure, axes = _figure(len(panels))
    for axis, (title, members) in zip(axes, panels.items(), strict=True):
        for row in members:
            turn, color = divmod(list(curves).index(row), 10)  # ten colours, then the next kind of line
            style = {"color": f"C{color}", "linestyle": ("-", "--", ":")[turn % 3], "linewidth": 1.2}
            axis.plot(*zip(*curves[row], strict=True), label=row, **style)
        axis.set_title(title if len(panels) > 1 else "")
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    return _save(figure, axes, path)


def _lines(
    panels: Mapping[str, Points],
    label: str,
    path: Path,
    *,
    logarithmic: bool = False,
    level: float | None = None,
) -> Path:
    """A panel per network, a line per method with the means' standard errors, dashed the `level` of float."""
    figure, axes = _figure(len(panels))
    names = list(dict.fromkeys(name for points in panels.values() for name in points))
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        for name, line in points.items():
            places, means, errors = zip(*line, strict=True)
            turn, color = divmod(names.index(name), 10)  # ten colours, then the next marker
            style = {"color": f"C{color}", "marker": "os^v"[turn % 4], "markersize": 4, "capsize": 2}
            axis.errorbar(places, means, errors, label=name, linewidth=1.2, **style)
        if level is not None:
            axis.axhline(level, label="float", color="0.4", linestyle="--", linewidth=1.0)
        axis.set_title(title)
        axis.set_xlabel(label)
        if logarithmic:
            axis.set_xscale("log")
        else:
            axis.xaxis.get_major_locator().set_params(integer=True)
    return _save(figure, axes, path)


def _figure(panels: int) -> tuple[Any, list[Any]]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "lightning_n2uq"  # the same figures give the same file
    columns = min(panels, 2)
    rows = -(-panels // columns)
    size = (max(8.0, 5.0 * columns), 4.0 * rows)
    space = {"hspace": 0.3}
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, gridspec_kw=space)
    for axis in axes.flat[panels:]:
        axis.set_axis_off()
    for row in axes:
        row[0].set_ylabel("test accuracy [%]")
    return figure, list(axes.flat[:panels])


def _save(figure: Any, axes: Sequence[Any], path: Path) -> Path:
    from matplotlib import pyplot

    found = [axis.get_legend_handles_labels() for axis in axes]
    entries = {
        label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)
    }
    place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    axes[min(len(axes), 2) - 1].legend(list(entries.values()), list(entries), fontsize=7, **place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)
    return path
