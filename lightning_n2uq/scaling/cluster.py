"""The machine of the model: nodes of ranks, links with latency and bandwidth, how fast a rank computes."""

from __future__ import annotations

from dataclasses import dataclass


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: got {value!r}, allowed are numbers above 0")


@dataclass(frozen=True)
class Link:
    """An alpha-beta link: a message of `n` bytes takes `latency_s + 8 n / (1e9 gbit)` seconds.

    Attributes:
        gbit: Bandwidth in Gbit/s, per direction.
        latency_s: Seconds from a send to the receive, without the bytes.

    Raises:
        ValueError: If the bandwidth is not positive or the latency is negative.
    """

    gbit: float
    latency_s: float = 50e-6

    def __post_init__(self) -> None:
        _positive("gbit", self.gbit)
        if not self.latency_s >= 0:
            raise ValueError(f"latency_s: got {self.latency_s!r}, allowed are numbers from 0")

    def seconds(self, nbytes: float) -> float:
        """Returns the time of `nbytes` on the wire, without latency."""
        return 8e-9 * nbytes / self.gbit


@dataclass(frozen=True)
class Cluster:
    """Ranks in nodes. The ranks of a node share its one link to the other nodes.

    Attributes:
        ranks: All of them.
        inter: Link of a node to the others.
        ranks_per_node: Has to divide `ranks`.
        intra: Link of a rank inside its node.
        framing: Bytes on the wire per byte handed to the collective: headers, acknowledgements.
        slowdown: How much slower a rank computes than measured alone, for ranks that share cores.
        one_by_one: Whether a rank handles the messages of an all-to-all one after the other, as ranks that
            share cores do, and not all at once.

    Raises:
        ValueError: If a count is impossible.
    """

    ranks: int
    inter: Link
    ranks_per_node: int = 1
    intra: Link = Link(100.0, 5e-6)
    framing: float = 1.06
    slowdown: float = 1.0
    one_by_one: bool = False

    def __post_init__(self) -> None:
        _positive("ranks", self.ranks)
        _positive("ranks_per_node", self.ranks_per_node)
        if self.ranks % self.ranks_per_node:
            raise ValueError(
                f"ranks_per_node: got {self.ranks_per_node}, allowed are divisors of {self.ranks}"
            )

    @property
    def nodes(self) -> int:
        """Returns the number of nodes."""
        return self.ranks // self.ranks_per_node

    @property
    def slowest(self) -> Link:
        """Returns the link that a ring through all ranks waits for."""
        return self.inter if self.nodes > 1 else self.intra


@dataclass(frozen=True)
class Speeds:
    """How fast one rank computes, in GB/s of fp32 gradients.

    Attributes:
        encode: By bits.
        decode: By bits.
        half: Cast to fp16 or back.
        powersgd: PowerSGD's products, orthogonalisation and residual, all of it, at rank 1.
        reduce: Sum of two fp32 vectors.
    """

    encode: dict[int, float]
    decode: dict[int, float]
    half: float
    powersgd: float
    reduce: float
