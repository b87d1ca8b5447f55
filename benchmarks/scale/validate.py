"""The model against the saved measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.scale.speeds import speeds_from
from lightning_n2uq.scaling.cluster import Cluster, Link, Speeds
from lightning_n2uq.scaling.methods import METHODS

LAB_LATENCY_S = 5e-4
"""Of one step of a collective in the netlab, times the ranks per core: mostly a wait for a core.

Fitted to one point, PowerSGD on four hosts at 100 Mbit/s, whose time is steps and not bytes; it is not
used for what is predicted of real clusters.
"""


def lab(hosts: int, mbit: int, cores: int) -> Cluster:
    """Return the netlab as the model sees it: hosts of one rank that share the machine's cores."""
    per_core = max(1.0, hosts / cores)
    link = Link(mbit / 1e3, LAB_LATENCY_S * per_core)
    return Cluster(hosts, link, slowdown=per_core, one_by_one=hosts > cores)


def points(saved: Mapping[str, Any], netlab: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Return measured and predicted seconds of every timed method that the model knows.

    ``error`` is relative: positive where the model is too slow. Measured is the best step of the
    slowest rank: other work on the machine only adds.

    Args:
        saved: The results of this benchmark.
        netlab: Those of :mod:`benchmarks.netlab`.
    """
    speeds: Speeds = speeds_from(saved["speeds"])
    cores = int(saved["cores"])
    rows = [*netlab, *(row for key in sorted(saved) if key.startswith("times:") for row in saved[key])]
    found = []
    for row in rows:
        if row["method"] in METHODS:
            cluster = lab(row["hosts"], row["mbit"], cores)
            measured = min(row["seconds"])
            predicted = METHODS[row["method"]](row["numel"], cluster, speeds)
            found.append(
                {name: row[name] for name in ("method", "hosts", "mbit", "numel")}
                | {"measured": measured, "predicted": predicted, "error": predicted / measured - 1}
            )
    return found


def render(found: list[dict[str, Any]]) -> str:
    """Return the comparison as a Markdown table."""
    lines = ["| hosts | Mbit/s | method | measured s | predicted s | error |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {p['hosts']} | {p['mbit']} | {p['method']} | {p['measured']:.3f} | {p['predicted']:.3f} "
        f"| {100 * p['error']:+.1f} % |"
        for p in found
    ]
    return "\n".join(lines)
