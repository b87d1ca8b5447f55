"""One picture: time against ranks, speed-up against bandwidth, error against ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.scale.tables import NUMEL
from lightning_n2uq.scaling.cluster import Cluster, Link, Speeds
from lightning_n2uq.scaling.methods import METHODS

_RANKS = [2**k for k in range(1, 11)]
_SHOWN = ("ddp", "ddp_fp16", "nuqsgd_8bit", "nuqsgd", "nuqsgd_2bit", "nuqsgd_all_gather", "ddp_powersgd")


def draw(saved: dict[str, Any], speeds: Speeds, path: Path) -> None:
    """Write the SVG; needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "lightning_n2uq"  # the same figures give the same file
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4.8))
    _times(left, speeds)
    _gains(middle, speeds)
    _errors(right, saved["error"]["curves"])
    for axes in (left, middle, right):
        axes.grid(alpha=0.3, which="major")
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _times(axes: Any, speeds: Speeds) -> None:
    for name in _SHOWN:
        seconds = [METHODS[name](NUMEL, Cluster(ranks, Link(1.0)), speeds) for ranks in _RANKS]
        axes.plot(_RANKS, seconds, marker=".", label=name, color=f"C{_SHOWN.index(name)}")
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="seconds per step")
    axes.set_xticks(_RANKS, [str(ranks) for ranks in _RANKS])
    axes.set_title("ResNet-50, 1 Gbit/s, predicted")


def _gains(axes: Any, speeds: Speeds) -> None:
    gbit = [0.05 * 1.25**k for k in range(36)]
    for name in _SHOWN[1:]:
        gains = []
        for rate in gbit:
            cluster = Cluster(16, Link(rate))
            gains.append(METHODS["ddp"](NUMEL, cluster, speeds) / METHODS[name](NUMEL, cluster, speeds))
        axes.plot(gbit, gains, label=name, color=f"C{_SHOWN.index(name)}")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="Gbit/s", ylabel="times as fast as ddp")
    axes.set_title("ResNet-50, 16 ranks, predicted")


def _errors(axes: Any, curves: dict[str, list[dict[str, float]]]) -> None:
    for name, rows in curves.items():
        ranks = [row["ranks"] for row in rows]
        (line,) = axes.plot(ranks, [row["both"] for row in rows], marker="o", markersize=4, label=name)
        axes.plot(
            ranks, [row["expected"] for row in rows], color=line.get_color(), linewidth=0.8, dashes=(3, 2)
        )
    first = next(iter(curves.values()))
    axes.plot(
        [row["ranks"] for row in first],
        [row["first"] for row in first],
        color="grey",
        marker="x",
        label="4 bits, first half alone",
    )
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="squared error / squared norm of the mean")
    ticks = [int(row["ranks"]) for row in first]
    axes.set_xticks(ticks, [str(ranks) for ranks in ticks])
    axes.minorticks_off()
    axes.set_title("averaged gradient, measured (dashed: expected)", fontsize=11)
