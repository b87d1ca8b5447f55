"""Plots of the documentation's performance page, from the JSON file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LIMIT = "memory traffic (copies)"


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes one SVG per topic that was measured; needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    mpl.rcParams["svg.hashsalt"] = "lightning_n2uq"  # the same figures give the same file
    drawn = []
    # `scaling.svg` is the picture of benchmarks.scale.
    plots = (
        ("quantizers", _quantizers, "quantizers"),
        ("scaling", _scaling, "cost"),
        ("steps", _steps, "steps"),
    )
    for topic, plot, name in plots:
        if topic in results:
            figure = plot(results[topic])
            path = folder / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
            drawn.append(path)
    return drawn


def _quantizers(results: dict[str, Any]) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2))
    keys = [key for key in results if key.endswith("bits")]
    names = list(results[keys[0]])
    for i, name in enumerate(names):
        places = [k + (i - len(names) / 2) * 0.8 / len(names) for k in range(len(keys))]
        axes.bar(places, [results[key][name]["ratio"] for key in keys], 0.8 / len(names), label=name)
    axes.set_yscale("log")
    axes.set_xticks(range(len(keys)), keys)
    axes.set_ylabel("time, torch's fused LSQ = 1")
    axes.set_title("activation quantizer, forward + backward")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _scaling(results: dict[str, Any]) -> Any:
    from matplotlib import pyplot

    figure, row = pyplot.subplots(1, 3, figsize=(11, 3.2))
    for axes, (key, label) in zip(
        row, (("numel", "values"), ("bits", "bits"), ("threads", "threads")), strict=True
    ):
        points = results[key]
        if not points:
            continue
        for name in next(iter(points.values())):
            axes.plot([int(x) for x in points], [points[x][name] for x in points], marker="o", label=name)
        axes.set_xlabel(label)
        axes.set_yscale("log")
        axes.set_xscale("log" if key == "numel" else "linear")
    row[0].set_ylabel("ns per value")
    row[0].legend(fontsize=7)
    return figure


def _steps(results: dict[str, Any]) -> Any:
    from matplotlib import pyplot

    figure, row = pyplot.subplots(1, 2, figsize=(9, 2.8))
    for axes, key, label in ((row[0], "step", "training step"), (row[1], "memory", "kept for backward")):
        names = list(results[key])
        axes.barh(names, [results[key][name]["ratio"] for name in names])
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlabel(f"{label}, float network = 1")
        axes.invert_yaxis()
    figure.tight_layout()
    return figure
