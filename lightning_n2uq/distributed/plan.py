"""Where the parameters of a DDP bucket lie, and the chains that synchronise it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_n2uq.distributed.chain import Chain
from lightning_n2uq.distributed.partition import Span
from lightning_n2uq.distributed.residuals import Owed


@dataclass(frozen=True)
class Place:
    """A parameter in a bucket's flat buffer.

    Attributes:
        name: Of the parameter; the key of its residual, because DDP rebuilds its buckets.
        start: First coordinate.
        numel: Number of coordinates.
        exact: Whether it travels in full precision.
    """

    name: str
    start: int
    numel: int
    exact: bool


@dataclass(frozen=True)
class BucketPlan:
    """How one bucket is exchanged, until DDP rebuilds its buckets or warm-up ends.

    Attributes:
        key: What the plan was made for.
        places: Parameters in the order of the buffer.
        chains: One per unit.
    """

    key: tuple[object, ...]
    places: Sequence[Place]
    chains: Sequence[Chain]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the parameters, in the order of the buffer."""
        return tuple(place.name for place in self.places)

    def export_residuals(self, owed: Owed) -> None:
        """Put this bucket's residuals into ``owed``."""
        if any(chain.carry is not None for chain in self.chains):
            self._split(self._flat(lambda chain, flat: chain.add_carry(flat)), owed.gradient)
        averaged = [leg.averaged for leg in self.chains[0].lossy]
        owed.averaged = owed.averaged or averaged
        owed.legs = owed.legs or [{} for _ in averaged]
        for number, residuals in enumerate(owed.legs):
            self._split(self._flat(_export_of(number)), residuals)

    def import_residuals(self, owed: Owed) -> None:
        """Take this bucket's residuals out of ``owed``."""
        carry = self._join(owed.gradient)
        legs = [self._join(residuals) for residuals in owed.legs]
        for chain in self.chains:
            if carry is not None:
                chain.carry = carry[chain.unit.start : chain.unit.stop]
            for leg, flat in zip(chain.lossy, legs, strict=False):
                if flat is not None:
                    leg.import_residuals(flat[chain.unit.start : chain.unit.stop])

    def _flat(self, write: Callable[[Chain, Tensor], None]) -> Tensor:
        device = self.chains[0].legs[0].send.device
        flat = torch.zeros(sum(place.numel for place in self.places), device=device)
        for chain in self.chains:
            write(chain, flat[chain.unit.start : chain.unit.stop])
        return flat

    def _split(self, flat: Tensor, store: dict[str, Tensor]) -> None:
        for place in self.places:
            store[place.name] = flat[place.start : place.start + place.numel].clone()

    def _join(self, store: dict[str, Tensor]) -> Tensor | None:
        if not any(place.name in store for place in self.places):
            return None
        flat = self._flat(lambda chain, flat: None)
        for place in self.places:
            residual = store.pop(place.name, None)
            if residual is not None:
                flat[place.start : place.start + place.numel] = residual.to(flat.device)
        return flat


def _export_of(number: int) -> Callable[[Chain, Tensor], None]:
    """Return what writes the residuals of a chain's ``number``-th leg that keeps some."""
    return lambda chain, flat: chain.lossy[number].export_residuals(flat)


def lay_out(
    parameters: Sequence[Tensor], name_of: Callable[[Tensor], str], exact: Callable[[Tensor], bool]
) -> list[Place]:
    """Return the places of a bucket's parameters, in order."""
    places, start = [], 0
    for parameter in parameters:
        places.append(Place(name_of(parameter), start, parameter.numel(), exact(parameter)))
        start += parameter.numel()
    return places


def whole_span(places: Sequence[Place]) -> Span:
    """Return the bucket as a span with its exact ranges."""
    exact = tuple((place.start, place.numel) for place in places if place.exact)
    return Span(0, sum(place.numel for place in places), exact)
