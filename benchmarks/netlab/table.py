"""The lab's figures as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.netlab.methods import BITS

_BUCKET_SIZE = 1024


def ideal_bytes(bits: int, numel: int, hosts: int) -> float:
    """Return what the two-phase scheme has to send per rank: codes and norms, no headers."""
    return 2 * (hosts - 1) / hosts * numel * (bits + 32 / _BUCKET_SIZE) / 8


def render(figures: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of the figures of one network.

    Columns: best time per step of the slowest rank (other work on the machine only adds; of rounds, a
    step's share of the best round), how many
    times faster than ``ddp`` and ``ddp_fp16``, megabytes that left a host per step, and these bytes
    over :func:`ideal_bytes` for packed codes.
    """
    times = {row["method"]: min(row["seconds"]) for row in figures}
    first = figures[0]
    lines = [
        f"{first['hosts']} hosts, {first['mbit']} Mbit/s, {first['numel'] / 1e6:.2f} M gradients",
        "",
        "| method | s/step | vs ddp | vs ddp_fp16 | MB sent/step | bytes / ideal |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures:
        name = row["method"]
        ratios = [
            f"{times[other] / times[name]:.2f}" if other in times else "-" for other in ("ddp", "ddp_fp16")
        ]
        packed = name in BITS and not name.endswith(("huffman", "all_gather"))
        ideal = f"{row['bytes'] / ideal_bytes(BITS[name], row['numel'], row['hosts']):.3f}" if packed else "-"
        lines.append(
            f"| {name} | {times[name]:.3f} | {' | '.join(ratios)} | {row['bytes'] / 1e6:.2f} | {ideal} |"
        )
    return "\n".join(lines) + "\n"
