"""The way of one unit: its legs one after the other, and the buffers between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_n2uq.compression import Codec, IdentityCodec, SkipCodec
from lightning_n2uq.distributed.config import ExchangeConfig
from lightning_n2uq.distributed.partition import Span, split_chunks
from lightning_n2uq.distributed.phases import Gather, GatherMean, Lane, Leg, Scatter
from lightning_n2uq.distributed.topology import Topology

CodecPair = tuple[Codec, Codec]
"""Codecs of the first and of the second phase."""


def lanes_for(spans: Sequence[Span], codec: Codec) -> list[Lane]:
    """Return one lane per span, its exact ranges carried along in full precision."""
    return [Lane(span, SkipCodec(codec, span.exact) if span.exact else codec) for span in spans]


def build_legs(
    unit: Span, config: ExchangeConfig, topology: Topology, codecs: CodecPair, device: torch.device
) -> list[Leg]:
    """Return the legs of one unit.

    Inside a node: full-precision reduce-scatter first and all-gather last, so each rank of a node
    compresses and sends only its slice; between nodes: one of the two schemes.
    """
    slices = split_chunks(unit, topology.local_size, config.bucket_size)
    own = slices[topology.local_rank]
    legs = _rail_legs(own, config, topology, codecs, device) if topology.rail else []
    if not topology.node:
        return legs
    lanes = lanes_for([Span(piece.start, piece.numel) for piece in slices], IdentityCodec())
    first, last = topology.node
    return [Scatter(first, lanes, device), *legs, Gather(last, lanes, device)]


def _rail_legs(
    own: Span, config: ExchangeConfig, topology: Topology, codecs: CodecPair, device: torch.device
) -> list[Leg]:
    """Return the compressed legs about the slice ``own`` of a unit."""
    feedback = config.error_feedback and not isinstance(codecs[0], IdentityCodec)
    below = topology.local_size
    if config.scheme == "all_gather":
        lanes = lanes_for([Span(0, own.numel, own.exact)] * topology.nodes, codecs[0])
        return [GatherMean(topology.rail[0], lanes, device, own.start, below, feedback)]
    chunks = split_chunks(own, topology.nodes, config.bucket_size)
    mine = own.start + chunks[topology.rail[0].rank].start
    first, second = topology.rail
    return [
        Scatter(first, lanes_for(chunks, codecs[0]), device, own.start, below, feedback),
        Gather(second, lanes_for(chunks, codecs[1]), device, mine, below * topology.nodes, feedback),
    ]


class Chain:
    """One unit's legs and buffers, reused at every step.

    Args:
        unit: Coordinates in the DDP bucket.
        index: Number of the unit, unique among all units of a step and equal on all ranks.
        legs: From :func:`build_legs`.
        dtype: Of the gradients; the arithmetic is fp32.
        device: Of the gradients.
    """

    def __init__(
        self, unit: Span, index: int, legs: Sequence[Leg], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.unit, self.index, self.legs = unit, index, list(legs)
        self.carry: Tensor | None = None  # residuals of an earlier layout, added once
        self._inner = [torch.empty(leg.output_numel, device=device) for leg in self.legs[:-1]]
        self._wide = None if dtype == torch.float32 else torch.empty(unit.numel, device=device)

    def source(self, stage: int, view: Tensor) -> Tensor:
        """Return the fp32 tensor that the leg of this stage sends."""
        if stage > 0:
            return self._inner[stage - 1]
        wide = view if self._wide is None else self._wide.copy_(view)
        if self.carry is not None:
            wide.add_(self.carry)
            self.carry = None
        return wide

    def target(self, stage: int, view: Tensor) -> Tensor:
        """Return the fp32 tensor into which the leg before this stage decodes."""
        if stage < len(self.legs):
            return self._inner[stage - 1]
        return view if self._wide is None else self._wide

    def store(self, view: Tensor) -> None:
        """Write the result into the gradient."""
        if self._wide is not None:
            view.copy_(self._wide)

    @property
    def lossy(self) -> list[Leg]:
        """Return the legs that keep residuals."""
        return [leg for leg in self.legs if leg.feedback is not None]

    def add_carry(self, flat: Tensor) -> None:
        """Add what waits for the next gradient to ``flat`` (fp32, the unit's coordinates)."""
        if self.carry is not None:
            flat.add_(self.carry)
