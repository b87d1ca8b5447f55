"""The model's answers as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_n2uq.scaling.cluster import Cluster, Link, Speeds
from lightning_n2uq.scaling.methods import METHODS

NUMEL = 25_600_000
"""Gradients of ResNet-50."""
RANKS = (2, 4, 8, 16, 32, 64, 256, 1024)
GBIT = (0.1, 1.0, 10.0, 25.0, 100.0)
FLAT = (
    "ddp",
    "ddp_fp16",
    "nuqsgd_8bit",
    "nuqsgd",
    "nuqsgd_3bit",
    "nuqsgd_2bit",
    "nuqsgd_all_gather",
    "ddp_powersgd",
)
NODES = (
    "ddp",
    "ddp_fp16",
    "nuqsgd",
    "nuqsgd_8bit_nodes",
    "nuqsgd_nodes",
    "nuqsgd_2bit_nodes",
    "ddp_powersgd",
)


def by_ranks(
    gbit: float, speeds: Speeds, per_node: int = 1, numel: int = NUMEL, ranks: Sequence[int] = RANKS
) -> str:
    """Return seconds per step and how many times faster than plain DDP, one row per number of ranks.

    Args:
        gbit: Bandwidth of every node.
        speeds: Of one rank.
        per_node: Ranks of a node.
        numel: Coordinates.
        ranks: Rows; those that no whole node makes up are left out.
    """
    names = FLAT if per_node == 1 else NODES
    lines = [f"| ranks | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for count in (count for count in ranks if count % per_node == 0):
        cluster = Cluster(count, Link(gbit), per_node)
        times = {name: METHODS[name](numel, cluster, speeds) for name in names}
        cells = [
            f"{seconds:.3g}" if name == "ddp" else f"{seconds:.3g} ({times['ddp'] / seconds:.2g}x)"
            for name, seconds in times.items()
        ]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def break_even_gbit(name: str, rival: str, ranks: int, speeds: Speeds, numel: int = NUMEL) -> float:
    """Return the bandwidth up to which a method beats another, between 1 Mbit/s and 10 Tbit/s.

    0 if it does not win even at the lowest, infinity if it still does at the highest. More bandwidth
    helps the method with more bytes more, so there is one such place.
    """

    def wins(gbit: float) -> bool:
        cluster = Cluster(ranks, Link(gbit))
        return METHODS[name](numel, cluster, speeds) < METHODS[rival](numel, cluster, speeds)

    low, high = 1e-3, 1e4
    if not wins(low):
        return 0.0
    if wins(high):
        return float("inf")
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if wins(middle) else (low, middle)
    return low


def break_even(speeds: Speeds, ranks: Sequence[int] = RANKS) -> str:
    """Return the bandwidths up to which ours beats plain DDP and fp16, one row per number of ranks."""
    pairs = [(name, rival) for name in FLAT[2:6] for rival in ("ddp", "ddp_fp16")]
    head = " | ".join(f"{name} / {rival}" for name, rival in pairs)
    lines = [f"| ranks | {head} |", "|---" * (len(pairs) + 1) + "|"]
    for count in ranks:
        found = [break_even_gbit(name, rival, count, speeds) for name, rival in pairs]
        cells = ["never" if gbit == 0 else f"{gbit:.2g}" for gbit in found]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def errors(saved: dict[str, list[dict[str, float]]]) -> str:
    """Return the measured errors of the averaged gradient, one row per setting; expectation in brackets."""
    ranks = [int(row["ranks"]) for row in next(iter(saved.values()))]
    lines = [f"| setting | {' | '.join(f'W={count}' for count in ranks)} |", "|---" * (len(ranks) + 1) + "|"]
    for name, rows in saved.items():
        cells = [f"{row['both']:.3g} ({row['expected']:.3g})" for row in rows]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
