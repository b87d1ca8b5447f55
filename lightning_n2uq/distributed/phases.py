"""The legs an exchange is made of: each sends encoded messages and turns what arrives into numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_n2uq.compression import Codec, ErrorFeedback
from lightning_n2uq.distributed.collectives import Wire, padded
from lightning_n2uq.distributed.partition import Span, offsets

SeedFn = Callable[[int], int]
"""From the index of a message within a leg to the seed of its stochastic rounding."""


@dataclass(frozen=True)
class Lane:
    """The message about one chunk.

    Attributes:
        span: Coordinates of the chunk, relative to the leg's tensor.
        codec: Turns them into bytes and back; equal on sender and receiver.
    """

    span: Span
    codec: Codec

    @property
    def bound(self) -> int:
        """Return the bytes to reserve for the message."""
        return padded(self.codec.nbytes(self.span.numel)) if self.span.numel else 0


def pack(
    lanes: Sequence[Lane], source: Tensor, seed: SeedFn, send: Tensor, feedback: ErrorFeedback | None
) -> list[int]:
    """Encode one message per lane into ``send``, one after the other at aligned places.

    Args:
        lanes: What to encode.
        source: fp32, 1-D.
        seed: Seeds by the lane's index.
        send: 1-D uint8, large enough for all lanes' bounds.
        feedback: Residuals by the lane's index, or None.

    Returns:
        Exact bytes of each message.
    """
    sizes, place = [], 0
    for index, lane in enumerate(lanes):
        size = 0
        if lane.span.numel:
            slot = send[place : place + lane.codec.nbytes(lane.span.numel)]
            piece = source[lane.span.start : lane.span.stop]
            if feedback is None:
                size = lane.codec.encode(piece, seed(index), out=slot).numel()
            else:
                size = feedback.encode(lane.codec, index, piece, seed(index), out=slot).numel()
        sizes.append(size)
        place += padded(size)
    return sizes


def unpack(buffer: Tensor, sizes: Sequence[int]) -> Sequence[Tensor] | Tensor:
    """Return the messages that :func:`pack` (here or on other ranks) put one after the other.

    Messages of one size come as the rows of one tensor, which codecs read without a copy.
    """
    if sizes and len(set(sizes)) == 1:
        slot = padded(sizes[0])
        return buffer[: slot * len(sizes)].view(len(sizes), slot)[:, : sizes[0]]
    places = offsets([padded(size) for size in sizes])
    return [buffer[place : place + size] for place, size in zip(places, sizes, strict=False)]


class Leg(ABC):
    """Half of an exchange: ``encode`` and ``transmit`` send, ``finish`` decodes once the bytes are here.

    Args:
        wire: Process group of this leg alone.
        lanes: One per rank of the wire.
        device: Where the buffers live. They are allocated once and reused at every step.
        origin: Where in the unit the tensor starts that this leg sends.
        averaged: Of how many ranks' gradients that tensor is the mean.
        feedback: Whether to add what earlier messages lost.
    """

    def __init__(
        self,
        wire: Wire,
        lanes: Sequence[Lane],
        device: torch.device,
        origin: int = 0,
        averaged: int = 1,
        feedback: bool = False,
    ) -> None:
        self.wire = wire
        self.lanes = list(lanes)
        self.own = self.lanes[wire.rank]
        self.origin, self.averaged = origin, averaged
        self.feedback = ErrorFeedback() if feedback else None
        self.fixed = all(lane.codec.fixed_size for lane in self.lanes)
        self.empty = not any(lane.span.numel for lane in self.lanes)  # the same on every rank of the wire
        self.sent_sizes: list[int] = []
        self.sizes: list[int] = []  # of the messages that arrive
        self.send = torch.empty(self._send_bound(), dtype=torch.uint8, device=device)
        self.recv = torch.empty(self._recv_bound(), dtype=torch.uint8, device=device)
        self._announced = torch.empty(wire.size, dtype=torch.int64, device=device)
        self._expected = torch.empty_like(self._announced)

    def encode(self, source: Tensor, seed: SeedFn) -> dist.Work | None:
        """Encode ``source`` (fp32, 1-D); where sizes vary, start telling the receivers."""
        if self.empty:
            return None
        self.sent_sizes = pack(self.outgoing(), source, seed, self.send, self.feedback)
        if self.fixed:
            return None
        self._announced.copy_(torch.tensor(self._sizes_to_send()))
        return self.wire.announce(self._expected, self._announced)

    def transmit(self) -> dist.Work | None:
        """Start sending; the work of ``encode`` must be done."""
        if self.empty:
            return None
        self.sizes = self._fixed_sizes() if self.fixed else [int(size) for size in self._expected.tolist()]
        return self._transmit()

    def error(self, source: Tensor) -> tuple[float, float]:
        """Return squared error and squared norm of what ``encode(source)`` put into the messages."""
        error_sq = norm_sq = 0.0
        for lane, payload in zip(self.outgoing(), unpack(self.send, self.sent_sizes), strict=False):
            if lane.span.numel:
                meant = source[lane.span.start : lane.span.stop]
                error_sq += float((lane.codec.decode(payload, meant.numel()) - meant).square().sum())
                norm_sq += float(meant.square().sum())
        return error_sq, norm_sq

    def export_residuals(self, flat: Tensor) -> None:
        """Add what is still owed to ``flat`` (fp32, the unit's coordinates)."""
        if self.feedback is None:
            return
        lanes = self.outgoing()
        for index, residual in self.feedback.residuals.items():
            span = lanes[int(str(index))].span
            start = self.origin + span.start
            flat[start : start + span.numel].add_(residual)

    def import_residuals(self, flat: Tensor) -> None:
        """Take what is owed from ``flat`` (as :meth:`export_residuals` wrote it)."""
        if self.feedback is None:
            return
        for index, lane in enumerate(self.outgoing()):
            start = self.origin + lane.span.start
            if lane.span.numel:
                self.feedback.residuals[index] = flat[start : start + lane.span.numel].clone()

    @property
    def output_numel(self) -> int:
        """Return how many coordinates ``finish`` writes: the own chunk unless all chunks are gathered."""
        return self.own.span.numel

    @abstractmethod
    def finish(self, target: Tensor) -> None:
        """Decode what arrived into ``target`` (fp32, 1-D)."""

    @abstractmethod
    def outgoing(self) -> list[Lane]:
        """Return the lanes this rank encodes, relative to what it sends, in the order of ``send``."""

    @abstractmethod
    def _transmit(self) -> dist.Work | None:
        """Issue the collective."""

    @abstractmethod
    def _sizes_to_send(self) -> list[int]:
        """Return the bytes that each rank will get, where they vary."""

    @abstractmethod
    def _fixed_sizes(self) -> list[int]:
        """Return the bytes that arrive from each rank, where they do not vary."""

    @abstractmethod
    def _send_bound(self) -> int: ...

    @abstractmethod
    def _recv_bound(self) -> int: ...


class Scatter(Leg):
    """First half: the ``i``-th chunk goes to rank ``i``, which averages the messages about its chunk.

    The mean is taken in rank order in fp32 by one rank, so it does not depend on who is faster.
    """

    def _transmit(self) -> dist.Work | None:
        outgoing, incoming = [padded(size) for size in self.sent_sizes], [padded(size) for size in self.sizes]
        return self.wire.all_to_all(
            self.recv[: sum(incoming)], self.send[: sum(outgoing)], incoming, outgoing
        )

    def finish(self, target: Tensor) -> None:
        """Write the mean of all ranks' messages about the own chunk."""
        if target.numel():
            self.own.codec.decode_mean(unpack(self.recv, self.sizes), target.numel(), out=target)

    def outgoing(self) -> list[Lane]:
        """Return all lanes."""
        return self.lanes

    def _sizes_to_send(self) -> list[int]:
        return self.sent_sizes

    def _fixed_sizes(self) -> list[int]:
        return [self.sent_sizes[self.wire.rank]] * self.wire.size

    def _send_bound(self) -> int:
        return sum(lane.bound for lane in self.lanes)

    def _recv_bound(self) -> int:
        return self.own.bound * self.wire.size


class Gather(Leg):
    """Second half: every rank sends its chunk to all, which decode the same bytes to the same numbers."""

    def _transmit(self) -> dist.Work | None:
        slot, incoming = padded(self.sent_sizes[0]), [padded(size) for size in self.sizes]
        recv = self.recv[: sum(incoming)]
        if len(set(incoming)) == 1:
            return self.wire.all_gather(recv, self.send[:slot])
        # all_gather needs messages of one size; with copies, an all-to-all sends the exact bytes instead.
        copies = self.send[: slot * self.wire.size].view(self.wire.size, slot)
        copies[1:] = copies[0]
        return self.wire.all_to_all(recv, copies.view(-1), incoming, [slot] * self.wire.size)

    @property
    def output_numel(self) -> int:
        """Return the coordinates of all chunks together."""
        return self.lanes[-1].span.stop

    def finish(self, target: Tensor) -> None:
        """Decode every rank's chunk into its place of ``target``."""
        for lane, payload in zip(self.lanes, unpack(self.recv, self.sizes), strict=True):
            if lane.span.numel:
                place = target[lane.span.start : lane.span.stop]
                lane.codec.decode(payload, lane.span.numel, out=place)

    def outgoing(self) -> list[Lane]:
        """Return the own lane; the tensor this leg sends is the own chunk alone."""
        return [Lane(Span(0, self.own.span.numel), self.own.codec)]

    def _sizes_to_send(self) -> list[int]:
        return self.sent_sizes * self.wire.size

    def _fixed_sizes(self) -> list[int]:
        return [lane.codec.nbytes(lane.span.numel) if lane.span.numel else 0 for lane in self.lanes]

    def _send_bound(self) -> int:
        return self.own.bound * self.wire.size

    def _recv_bound(self) -> int:
        return sum(lane.bound for lane in self.lanes)


class GatherMean(Gather):
    """The paper's scheme: every rank sends all of its coordinates to all and averages what it gets."""

    def finish(self, target: Tensor) -> None:
        """Write the mean of all ranks' messages, taken in rank order."""
        self.own.codec.decode_mean(unpack(self.recv, self.sizes), target.numel(), out=target)
