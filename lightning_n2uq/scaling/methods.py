"""Seconds of one gradient synchronisation, method by method.

Nothing overlaps with the backward pass here: what is predicted is the time from the first gradient to
the last mean, as the netlab measures it. Inside ours, encoding, network and decoding overlap unit by
unit: the slower of processor and network sets the pace, and one unit of the other is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lightning_n2uq.scaling.cluster import Cluster, Link, Speeds
from lightning_n2uq.scaling.volume import (
    UNIT,
    all_gather_bytes,
    all_reduce_bytes,
    powersgd_numel,
    two_phase_bytes,
)

_DDP_BUCKET = 25 * 2**20
"""Bytes of a DDP bucket: every bucket is one all-reduce."""


def _reduce_s(nbytes: float, cluster: Cluster, calls: int) -> float:
    """Returns the seconds of ring all-reduces through all ranks, `nbytes` in `calls` messages.

    The ring visits node after node, so a node's link carries one rank's traffic.
    """
    link = cluster.slowest
    wire = link.seconds(cluster.framing * all_reduce_bytes(nbytes, cluster.ranks))
    return wire + calls * 2 * (cluster.ranks - 1) * link.latency_s


def _compute_s(numel: float, speed: float, cluster: Cluster) -> float:
    return 4e-9 * numel / speed * cluster.slowdown


def ddp_s(numel: int, cluster: Cluster, speeds: Speeds) -> float:
    """fp32 ring all-reduce, as plain DDP."""
    if cluster.ranks == 1:
        return 0.0
    calls = math.ceil(4 * numel / _DDP_BUCKET)
    return _reduce_s(4 * numel, cluster, calls) + _compute_s(numel, speeds.reduce, cluster)


def fp16_s(numel: int, cluster: Cluster, speeds: Speeds) -> float:
    """fp16 ring all-reduce with two casts, as torch's hook."""
    if cluster.ranks == 1:
        return 0.0
    calls = math.ceil(4 * numel / _DDP_BUCKET)
    compute = _compute_s(2 * numel, speeds.half, cluster) + _compute_s(numel, speeds.reduce, cluster)
    return _reduce_s(2 * numel, cluster, calls) + compute


def powersgd_s(numel: int, cluster: Cluster, speeds: Speeds) -> float:
    """Torch's PowerSGD at rank 1: three all-reduces per bucket (1-D parameters, P, Q)."""
    if cluster.ranks == 1:
        return 0.0
    calls = 3 * math.ceil(4 * numel / _DDP_BUCKET)
    return _reduce_s(4 * powersgd_numel(numel), cluster, calls) + _compute_s(numel, speeds.powersgd, cluster)


def _pipelined(processor: float, network: float, units: int) -> float:
    return max(processor, network) + min(processor, network) / max(1, units)


def _two_phase(
    numel: float, bits: int, ranks: int, link: Link, sharing: int, cluster: Cluster, speeds: Speeds
) -> float:
    """Returns the time of the exchange of codes of some bits; see `exchange_s`."""
    volume = two_phase_bytes(math.ceil(numel), bits, ranks)
    rates = speeds.encode[bits], speeds.decode[bits]
    return exchange_s(numel, volume, rates, ranks, link, sharing, cluster)


def exchange_s(
    numel: float,
    volume: tuple[float, float, int],
    rates: tuple[float, float],
    ranks: int,
    link: Link,
    sharing: int,
    cluster: Cluster,
) -> float:
    """Returns the time of the exchange among `ranks`, `sharing` of which use one link at once.

    The all-to-all starts all its messages together (unless ranks share cores); the all-gather is a ring of
    `ranks - 1` steps.

    Args:
        numel: Coordinates.
        volume: Bytes of both halves and the number of units, from `exchange_bytes`.
        rates: How fast a rank encodes and decodes, in GB/s of fp32.
        ranks: That take part.
        link: Between them.
        sharing: How many of them use one link at once.
        cluster: What else slows messages and ranks.
    """
    first, second, units = volume
    wire = link.seconds(cluster.framing * sharing * (first + second))
    waits = (ranks - 1 if cluster.one_by_one else 1) + (ranks - 1)
    network = wire + units * link.latency_s * waits
    encoded, decoded = numel * (1 + 1 / ranks), 2 * numel
    processor = _compute_s(encoded, rates[0], cluster) + _compute_s(decoded, rates[1], cluster)
    return _pipelined(processor, network, units)


def two_phase_s(bits: int) -> Callable[[int, Cluster, Speeds], float]:
    """All-to-all and all-gather of codes among all ranks (the default scheme)."""

    def seconds(numel: int, cluster: Cluster, speeds: Speeds) -> float:
        if cluster.ranks == 1:
            return 0.0
        sharing = cluster.ranks_per_node if cluster.nodes > 1 else 1
        return _two_phase(numel, bits, cluster.ranks, cluster.slowest, sharing, cluster, speeds)

    return seconds


def hierarchical_s(bits: int) -> Callable[[int, Cluster, Speeds], float]:
    """fp32 reduce-scatter and all-gather inside a node, codes between nodes (`hierarchical: true`).

    Every rank exchanges `1 / ranks_per_node` of the gradient, all of them over the node's link.
    """

    def seconds(numel: int, cluster: Cluster, speeds: Speeds) -> float:
        local = cluster.ranks_per_node
        inside = 0.0
        if local > 1:
            inside = cluster.intra.seconds(all_reduce_bytes(4 * numel, local))
            inside += 2 * (local - 1) * math.ceil(numel / UNIT) * cluster.intra.latency_s
            inside += _compute_s(numel, speeds.reduce, cluster)
        if cluster.nodes == 1:
            return inside
        return inside + _two_phase(numel / local, bits, cluster.nodes, cluster.inter, local, cluster, speeds)

    return seconds


def all_gather_s(bits: int) -> Callable[[int, Cluster, Speeds], float]:
    """Every rank sends everything to everybody and decodes all (`scheme: all_gather`, the paper's)."""

    def seconds(numel: int, cluster: Cluster, speeds: Speeds) -> float:
        ranks = cluster.ranks
        if ranks == 1:
            return 0.0
        units = math.ceil(numel / UNIT)
        sharing = cluster.ranks_per_node if cluster.nodes > 1 else 1
        link = cluster.slowest
        network = link.seconds(cluster.framing * sharing * all_gather_bytes(numel, bits, ranks))
        network += units * (ranks - 1) * link.latency_s
        processor = _compute_s(numel, speeds.encode[bits], cluster)
        processor += _compute_s(ranks * numel, speeds.decode[bits], cluster)
        return _pipelined(processor, network, units)

    return seconds


Predict = Callable[[int, Cluster, Speeds], float]
METHODS: dict[str, Predict] = {
    "ddp": ddp_s,
    "ddp_fp16": fp16_s,
    "ddp_powersgd": powersgd_s,
    "nuqsgd_8bit": two_phase_s(8),
    "nuqsgd": two_phase_s(4),
    "nuqsgd_3bit": two_phase_s(3),
    "nuqsgd_2bit": two_phase_s(2),
    "nuqsgd_all_gather": all_gather_s(4),
    "nuqsgd_8bit_nodes": hierarchical_s(8),
    "nuqsgd_nodes": hierarchical_s(4),
    "nuqsgd_2bit_nodes": hierarchical_s(2),
}
"""By name, as in the netlab; `_nodes` are hierarchical."""
