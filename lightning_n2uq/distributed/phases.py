"""The phases of an exchange: each sends encoded messages and turns what arrives into numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from lightning_n2uq.compression import Codec, ErrorFeedback, IdentityCodec, SkipCodec
from lightning_n2uq.distributed.collectives import Collectives, ExchangeGroups, Work
from lightning_n2uq.distributed.config import ExchangeConfig
from lightning_n2uq.distributed.partition import Span, split_chunks

ALIGNMENT = 16  # a payload starts at a multiple of this, so that codecs may view it as wider words

SeedFn = Callable[[int], int]
"""From the index of a message within a phase to the seed of its stochastic rounding."""


CodecPair = tuple[Codec, Codec]
"""The codecs of the first and of the second phase."""


def padded(size: int) -> int:
    """Returns `size` rounded up to the alignment of payloads."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class ChunkMessage:
    """The message about one chunk.

    Attributes:
        where: The chunk's coordinates, relative to the phase's tensor.
        numel: How many they are; may be 0.
        codec: Turns them into bytes and back; equal on sender and receiver.
    """

    where: slice
    numel: int
    codec: Codec

    @staticmethod
    def about(span: Span, codec: Codec) -> ChunkMessage:
        """Returns the message about a span, whose exact ranges travel along in full precision."""
        return ChunkMessage(span.slice, span.numel, SkipCodec(codec, span.exact) if span.exact else codec)

    def alone(self) -> ChunkMessage:
        """Returns the message for a tensor that holds the chunk alone."""
        return replace(self, where=slice(0, self.numel))

    @property
    def nbytes(self) -> int:
        """The bytes of the message, or a bound where messages vary in size."""
        return self.codec.nbytes(self.numel) if self.numel else 0


class Phase(ABC):
    """Half of an exchange: `encode` and `transmit` send, `finish` decodes once the bytes are here.

    Args:
        collectives: Those of this phase alone.
        outgoing: What this rank encodes, relative to what it sends: one message per rank, or one for all.
        arriving: What it gets, one message per rank.
        device: The device of the buffers, which are allocated once and reused at every step.
        origin: Where in the unit the tensor starts that this phase sends.
        averaged: The number of ranks whose gradients that tensor is the mean of.
        feedback: Whether to add what earlier messages lost.

    Attributes:
        output_numel: How many coordinates `finish` writes.
    """

    def __init__(
        self,
        collectives: Collectives,
        outgoing: Sequence[ChunkMessage],
        arriving: Sequence[ChunkMessage],
        device: torch.device,
        origin: int = 0,
        averaged: int = 1,
        feedback: bool = False,
    ) -> None:
        self.collectives, self.outgoing, self.arriving = collectives, outgoing, arriving
        self.origin, self.averaged = origin, averaged
        self.feedback = ErrorFeedback() if feedback else None
        self.fixed = all(message.codec.fixed_size for message in (*outgoing, *arriving))
        self.empty = not any(message.numel for message in (*outgoing, *arriving))  # the same on every rank
        self.output_numel = max(message.where.stop for message in arriving)
        self.sent_sizes: list[int] = []
        self.sizes: list[int] = []  # of the messages that arrive
        self._copies = collectives.size // len(outgoing)
        send = sum(_slots([message.nbytes for message in outgoing])) * self._copies
        recv = sum(_slots([message.nbytes for message in arriving]))
        self.send = torch.empty(send, dtype=torch.uint8, device=device)
        self.recv = torch.empty(recv, dtype=torch.uint8, device=device)
        self._announced = torch.empty(collectives.size, dtype=torch.int64, device=device)
        self._expected = torch.empty_like(self._announced)

    def encode(self, source: Tensor, seed: SeedFn) -> Work | None:
        """Encodes `source` (fp32, 1-D); where sizes vary, starts telling the receivers."""
        if self.empty:
            return None
        self.sent_sizes = self._pack(source, seed)
        if self.fixed:
            return None
        self._announced.copy_(torch.tensor(self.sent_sizes * self._copies))
        return self.collectives.announce_sizes(self._expected, self._announced)

    def _pack(self, source: Tensor, seed: SeedFn) -> list[int]:
        """Encodes the outgoing messages into `send`, at aligned places; returns their exact bytes."""
        sizes, place = [], 0
        for index, message in enumerate(self.outgoing):
            size = 0
            if message.numel:
                slot = self.send[place : place + message.nbytes]
                piece = source[message.where]
                if self.feedback is None:
                    size = message.codec.encode(piece, seed(index), out=slot).numel()
                else:
                    size = self.feedback.encode(message.codec, index, piece, seed(index), out=slot).numel()
            sizes.append(size)
            place += padded(size)
        return sizes

    def transmit(self) -> Work | None:
        """Starts sending; the work of `encode` must be done."""
        if self.empty:
            return None
        if self.fixed:
            self.sizes = [message.nbytes for message in self.arriving]
        else:
            self.sizes = [int(size) for size in self._expected.tolist()]
        return self._transmit(_slots(self.sent_sizes), _slots(self.sizes))

    def finish(self, target: Tensor) -> None:
        """Decodes what arrived into `target` (fp32, 1-D)."""
        if target.numel() and not self.empty:
            self._decode(_unpack(self.recv, self.sizes), target)

    def error(self, source: Tensor) -> tuple[float, float]:
        """Returns squared error and squared norm of what `encode(source)` put into the messages."""
        error_sq = norm_sq = 0.0
        for message, payload in zip(self.outgoing, _unpack(self.send, self.sent_sizes), strict=False):
            if message.numel:
                meant = source[message.where]
                error_sq += float((message.codec.decode(payload, meant.numel()) - meant).square().sum())
                norm_sq += float(meant.square().sum())
        return error_sq, norm_sq

    def export_residuals(self, flat: Tensor) -> None:
        """Adds the residuals of this rank's messages to `flat` (fp32, the unit's coordinates)."""
        for index, place in self._residual_places():
            if self.feedback is not None and index in self.feedback.residuals:
                flat[place].add_(self.feedback.residuals[index])

    def import_residuals(self, flat: Tensor) -> None:
        """Takes the residuals of this rank's messages from `flat` (as `export_residuals` wrote it)."""
        for index, place in self._residual_places():
            if self.feedback is not None:
                self.feedback.residuals[index] = flat[place].clone()

    def _residual_places(self) -> Iterator[tuple[int, slice]]:
        """Yields the index of every message, and where in the unit its chunk lies."""
        for index, message in enumerate(self.outgoing):
            if message.numel:
                yield index, slice(self.origin + message.where.start, self.origin + message.where.stop)

    @abstractmethod
    def _transmit(self, outgoing: list[int], incoming: list[int]) -> Work | None:
        """Issues the collective, given the padded bytes of every message."""

    @abstractmethod
    def _decode(self, payloads: Sequence[Tensor] | Tensor, target: Tensor) -> None:
        """Decodes the messages, one per rank."""


class ReduceScatterPhase(Phase):
    """The `i`-th chunk goes to rank `i`, which averages the messages about its chunk.

    The mean is taken in rank order in fp32 by one rank, so it does not depend on who is faster.
    """

    def _transmit(self, outgoing: list[int], incoming: list[int]) -> Work | None:
        send, recv = self.send[: sum(outgoing)], self.recv[: sum(incoming)]
        return self.collectives.all_to_all(recv, send, incoming, outgoing)

    def _decode(self, payloads: Sequence[Tensor] | Tensor, target: Tensor) -> None:
        self.arriving[0].codec.decode_mean(payloads, target.numel(), out=target)


class AllGatherPhase(Phase):
    """Every rank sends its chunk to all, which decode the same bytes to the same numbers."""

    def _transmit(self, outgoing: list[int], incoming: list[int]) -> Work | None:
        slot, recv = outgoing[0], self.recv[: sum(incoming)]
        if len(set(incoming)) == 1:
            return self.collectives.all_gather(recv, self.send[:slot])
        # all_gather needs messages of one size; with copies, an all-to-all sends the exact bytes instead.
        copies = self.send[: slot * self._copies].view(self._copies, slot)
        copies[1:] = copies[0]
        return self.collectives.all_to_all(recv, copies.view(-1), incoming, [slot] * self._copies)

    def _decode(self, payloads: Sequence[Tensor] | Tensor, target: Tensor) -> None:
        for message, payload in zip(self.arriving, payloads, strict=True):
            if message.numel:
                message.codec.decode(payload, message.numel, out=target[message.where])


class AllGatherMeanPhase(AllGatherPhase):
    """The paper's scheme: every rank sends all of its coordinates to all and averages what it gets."""

    def _decode(self, payloads: Sequence[Tensor] | Tensor, target: Tensor) -> None:
        self.arriving[0].codec.decode_mean(payloads, target.numel(), out=target)


def _slots(sizes: Sequence[int]) -> list[int]:
    return [padded(size) for size in sizes]


def _unpack(buffer: Tensor, sizes: Sequence[int]) -> Sequence[Tensor] | Tensor:
    """Returns the messages that were packed (here or on other ranks) one after the other.

    Messages of one size come as the rows of one tensor, which codecs read without a copy.
    """
    slots = _slots(sizes)
    if sizes and len(set(sizes)) == 1:
        return buffer[: sum(slots)].view(len(sizes), slots[0])[:, : sizes[0]]
    places = accumulate(slots, initial=0)
    return [buffer[place : place + size] for place, size in zip(places, sizes, strict=False)]


def build_phases(
    unit: Span, config: ExchangeConfig, groups: ExchangeGroups, codecs: CodecPair, device: torch.device
) -> list[Phase]:
    """Returns the phases of one unit.

    Inside a node: full-precision reduce-scatter first and all-gather last, so each rank of a node
    compresses and sends only its slice; between nodes: one of the two schemes.
    """
    slices = split_chunks(unit, groups.local_size, config.bucket_size)
    own = slices[groups.local_rank]
    phases = _inter_node_phases(own, config, groups, codecs, device) if groups.inter_node else []
    if not groups.intra_node:
        return phases
    messages = [ChunkMessage(piece.slice, piece.numel, IdentityCodec()) for piece in slices]
    mine = messages[groups.local_rank].alone()
    first, last = groups.intra_node
    return [
        ReduceScatterPhase(first, messages, [mine] * groups.local_size, device),
        *phases,
        AllGatherPhase(last, [mine], messages, device),
    ]


def _inter_node_phases(
    own: Span, config: ExchangeConfig, groups: ExchangeGroups, codecs: CodecPair, device: torch.device
) -> list[Phase]:
    """Returns the compressed phases about the slice `own` of a unit."""
    feedback = config.error_feedback and not isinstance(codecs[0], IdentityCodec)
    ranks, nodes = groups.local_size, groups.nodes
    if config.scheme == "all_gather":
        whole = ChunkMessage.about(own, codecs[0]).alone()
        return [
            AllGatherMeanPhase(
                groups.inter_node[0], [whole], [whole] * nodes, device, own.start, ranks, feedback
            )
        ]
    first, second = groups.inter_node
    chunks = split_chunks(own, nodes, config.bucket_size)
    raw, mean = ([ChunkMessage.about(chunk, codec) for chunk in chunks] for codec in codecs)
    mine, origin = mean[first.rank].alone(), own.start + chunks[first.rank].start
    arriving = [raw[first.rank].alone()] * nodes
    return [
        ReduceScatterPhase(first, raw, arriving, device, own.start, ranks, feedback),
        AllGatherPhase(second, [mine], mean, device, origin, ranks * nodes, feedback),
    ]
