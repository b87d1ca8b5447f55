"""The model against the saved measurements."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from benchmarks.scale.cluster import Cluster, Link, Speeds
from benchmarks.scale.methods import METHODS
from benchmarks.scale.speeds import speeds_from

LAB_LATENCY_S = 100e-6
"""Of the netlab's virtual cables with gloo's processes at both ends, several to a processor."""


def lab(hosts: int, mbit: int, cores: int) -> Cluster:
    """Return the netlab as the model sees it: hosts of one rank that share the machine's cores."""
    return Cluster(hosts, Link(mbit / 1e3, LAB_LATENCY_S), slowdown=max(1.0, hosts / cores))


def points(saved: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return measured and predicted seconds of every timed method.

    ``error`` is relative: positive where the model is too slow. Measured is the best step of the
    slowest rank: other work on the machine only adds.
    """
    speeds: Speeds = speeds_from(saved["speeds"])
    cores = int(saved.get("cores", os.cpu_count() or 1))
    found = []
    for key in sorted(key for key in saved if key.startswith("times:")):
        for row in saved[key]:
            if row["method"] not in METHODS:
                continue
            measured = min(row["seconds"])
            cluster = lab(row["hosts"], row["mbit"], cores)
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
