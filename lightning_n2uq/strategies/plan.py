"""Where the parameters of a DDP bucket lie, and the chains that synchronise it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_n2uq.strategies.chain import Chain
from lightning_n2uq.strategies.layout import Span


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

    def export_residuals(self, store: dict[str, Tensor]) -> None:
        """Put this bucket's residuals into ``store``, by parameter."""
        flat = torch.cat([chain.export_residuals() for chain in self.chains])
        for place in self.places:
            store[place.name] = flat[place.start : place.start + place.numel].clone()

    def import_residuals(self, store: dict[str, Tensor]) -> None:
        """Take this bucket's residuals out of ``store``: they are added to the next gradient."""
        if not any(place.name in store for place in self.places):
            return
        device = self.chains[0].legs[0].send.device
        flat = torch.zeros(sum(place.numel for place in self.places), device=device)
        for place in self.places:
            residual = store.pop(place.name, None)
            if residual is not None:
                flat[place.start : place.start + place.numel] = residual.to(device)
        for chain in self.chains:
            chain.carry = flat[chain.unit.start : chain.unit.stop]


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
