"""Which method would pay on a job: the model of `methods`, on what the job has measured of itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_n2uq.compression import CODECS, make_codec
from lightning_n2uq.compression.registry import BIASED
from lightning_n2uq.scaling.cluster import Cluster, Link, Speeds
from lightning_n2uq.scaling.measured import Measured
from lightning_n2uq.scaling.methods import ddp_s, exchange_s, fp16_s, powersgd_s
from lightning_n2uq.scaling.volume import all_reduce_bytes, exchange_bytes, powersgd_numel

LOCAL = "nuqsgd_local"
NODES = " hierarchical"
MEASURED = "this run"
_CODEC_RATE = 2.0  # GB/s of fp32 where the run has not measured it
_RATES = {"half": 4.0, "powersgd": 0.55, "reduce": 3.0}  # GB/s of fp32, as in docs/scaling.md
_CLOSE = 1.05  # methods as fast as that are told apart by their error


@dataclass(frozen=True)
class Prediction:
    """What a method would cost.

    Attributes:
        method: The name of the strategy.
        bits: Bits per coordinate, norms included.
        sent_bytes: Bytes that a rank sends per step.
        sync_s: Seconds of synchronization per step.
        step_s: Seconds per step.
        error: Squared error of the averaged gradient, relative to it; None where it is biased or unknown.
    """

    method: str
    bits: float
    sent_bytes: float
    sync_s: float
    step_s: float
    error: float | None


class Advisor:
    """Predicts methods for a job.

    Nothing overlaps with the backward pass, as in docs/scaling.md: a step takes what it took outside of the
    exchange, and then the exchange.

    Args:
        measured: The run's figures.
        link: The link between nodes; None takes the measured one.
        ranks: The number of ranks; None takes the run's.
        ranks_per_node: Those of a node; None takes the run's.
        period: The period of `nuqsgd_local`.

    Raises:
        ValueError: The run has one rank and no link was given, or a number is impossible.
    """

    def __init__(
        self,
        measured: Measured,
        link: Link | None = None,
        ranks: int | None = None,
        ranks_per_node: int | None = None,
        period: int = 10,
    ) -> None:
        self.measured, self.period = measured, period
        framing = 1.06 if link is not None else 1.0  # a measured speed has headers taken off
        if link is None:
            if not measured.link_mbit:
                raise ValueError("mbit: got None, which needs a run of several ranks; allowed is a number")
            link = Link(measured.link_mbit / 1e3, measured.latency_s)
        ranks = ranks or measured.ranks
        per_node = ranks_per_node or math.gcd(measured.ranks_per_node, ranks)
        self.cluster = Cluster(ranks, link, per_node, framing=framing)
        self._rates = self._codec_rates()

    def _codec_rates(self) -> tuple[float, float]:
        """Returns GB/s of encoding and decoding: the run's where it compressed."""
        m = self.measured
        if not m.encode_s or not m.decode_s or m.ranks < 2:
            return _CODEC_RATE, _CODEC_RATE
        gigabytes = 4e-9 * m.coordinates
        return gigabytes * (1 + 1 / m.ranks) / m.encode_s, 2 * gigabytes / m.decode_s

    @property
    def compute_s(self) -> float:
        """Seconds of a step without exchange."""
        m = self.measured
        sync = m.sync_s / m.period
        if not sync and m.ranks > 1 and m.link_mbit:  # plain DDP, which counts nothing
            cluster = Cluster(m.ranks, Link(m.link_mbit / 1e3, m.latency_s), m.ranks_per_node, framing=1.0)
            sync = ddp_s(m.coordinates, cluster, self._speeds)
        return max(m.step_s - sync, 0.05 * m.step_s)

    @property
    def _speeds(self) -> Speeds:
        return Speeds({}, {}, **_RATES)

    def predictions(self) -> list[Prediction]:
        """Returns all methods, the fastest first."""
        numel, ranks = self.measured.coordinates, self.cluster.ranks
        low_rank = powersgd_numel(numel)
        plain = [
            ("ddp", 32.0, 4.0 * numel, ddp_s, 0.0),
            ("ddp_fp16", 16.0, 2.0 * numel, fp16_s, 0.0),
            ("ddp_powersgd", 32.0 * low_rank / numel, 4.0 * low_rank, powersgd_s, None),
        ]
        found = [
            self._prediction(
                name, bits, all_reduce_bytes(nbytes, ranks), call(numel, self.cluster, self._speeds), error
            )
            for name, bits, nbytes, call, error in plain
        ]
        for name in CODECS:
            found.append(self._exchange(name, hierarchical=False))
            if 1 < self.cluster.ranks_per_node < ranks:
                found.append(self._exchange(name, hierarchical=True))
        found += [self._local(one) for one in found if one.method in ("nuqsgd", "nuqsgd" + NODES)]
        return sorted(found, key=lambda one: one.step_s)

    def _prediction(
        self, method: str, bits: float, sent: float, sync_s: float, error: float | None
    ) -> Prediction:
        return Prediction(method, bits, sent, sync_s, self.compute_s + sync_s, error)

    def _exchange(self, name: str, hierarchical: bool) -> Prediction:
        """Predicts one of our strategies; with `hierarchical` codes travel between nodes alone."""
        m, cluster, codec = self.measured, self.cluster, make_codec(name)
        local = cluster.ranks_per_node if hierarchical else 1
        ranks, numel = cluster.ranks // local, math.ceil((m.coordinates - m.exact) / local)
        first, second, units = exchange_bytes(numel, codec, ranks, getattr(codec, "bucket_size", 1024))
        exact = all_reduce_bytes(4 * m.exact / local, ranks) / 2
        volume = (first + exact, second + exact, max(units, 1))
        link, sharing = cluster.slowest, cluster.ranks_per_node if cluster.nodes > 1 else 1
        seconds = exchange_s(m.coordinates / local, volume, self._rates, ranks, link, sharing, cluster)
        if hierarchical:
            inside = all_reduce_bytes(4 * m.coordinates, local)
            seconds += cluster.intra.seconds(inside) + 4e-9 * m.coordinates / self._speeds.reduce
        bits = 8 * codec.nbytes(1 << 20) / (1 << 20)
        error = None if name in BIASED else m.errors.get(name)
        mean = None if error is None else error_of_mean(error, m.spread or 1.0, ranks)
        return self._prediction(name + NODES * hierarchical, bits, sum(volume[:2]), seconds, mean)

    def _local(self, one: Prediction) -> Prediction:
        """Predicts rounds that exchange as rarely as `period` says."""
        name = one.method.replace("nuqsgd", LOCAL)
        return self._prediction(
            name, one.bits / self.period, one.sent_bytes / self.period, one.sync_s / self.period, one.error
        )


def error_of_mean(error: float, spread: float, ranks: int) -> float:
    """Returns the squared error of the averaged gradient, relative to it; derived in docs/scaling.md.

    Args:
        error: Of one message in either phase.
        spread: A rank's squared gradient over that of the mean gradient.
        ranks: Whose roundings are averaged in the first phase.
    """
    first = error * spread / ranks
    return first + error * (1 + first)


def recommendation(found: Sequence[Prediction], max_error: float, period: int) -> str:
    """Returns one line that says what would pay.

    Among unbiased methods of an error up to `max_error`, the fastest, and of those that are nearly as fast
    the most exact one; rounds are mentioned apart, since they train another way.

    Args:
        found: All methods.
        max_error: The largest squared error of the averaged gradient, relative to it.
        period: The period of the rounds.
    """
    plain = next(one for one in found if one.method == "ddp")
    fits = [
        one
        for one in found
        if one.error is not None and one.error <= max_error and not one.method.startswith(LOCAL)
    ]
    fastest = min(one.step_s for one in fits)
    close = [one for one in fits if one.step_s <= _CLOSE * fastest]
    best = min(close, key=lambda one: (one.error, one.step_s))
    gain = plain.step_s / best.step_s
    line = (
        f"What would pay: {best.method}, {gain:.2g} times as many steps per second as ddp"
        if best is not plain and gain > _CLOSE
        else "What would pay: nothing among them, ddp is within 5 % of the fastest"
    )
    rounds = min((one for one in found if one.method.startswith(LOCAL)), key=lambda one: one.step_s)
    more = plain.step_s / rounds.step_s
    if more > _CLOSE * max(gain, 1.0):
        line += f"; {rounds.method} with period {period}, {more:.2g} times (fewer rounds train another way)"
    return line


def table(advisor: Advisor, found: Sequence[Prediction]) -> str:
    """Returns the methods as aligned text, under one line about the job and what was measured there."""
    m, cluster = advisor.measured, advisor.cluster
    lines = [
        f"{cluster.ranks} ranks, {cluster.ranks_per_node} per node, {m.coordinates / 1e6:.3g} M gradients, "
        f"{cluster.inter.gbit * 1e3:.4g} Mbit/s, {advisor.compute_s:.3g} s per step beside the exchange",
        "",
        f"{'method':<28}{'bits':>7}{'MB/step':>11}{'s/exchange':>12}{'s/step':>10}{'error':>10}",
    ]
    if m.sync_s:
        own = Prediction(
            MEASURED, 0.0, m.sent_bytes / m.period, m.sync_s / m.period, m.step_s, m.relative_error or None
        )
        lines.append(_line(own))
    return "\n".join([*lines, *map(_line, found)])


def _line(one: Prediction) -> str:
    bits = f"{one.bits:.3g}" if one.bits else "-"
    error = "-" if one.error is None else f"{one.error:.2g}"
    megabytes = one.sent_bytes / 1e6
    return f"{one.method:<28}{bits:>7}{megabytes:>11.4g}{one.sync_s:>12.4g}{one.step_s:>10.4g}{error:>10}"
