"""What the flat tensor of one of FSDP2's collectives holds, and so which of it travels in full precision."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_n2uq.compression import Codec
from lightning_n2uq.distributed.partition import Place, Span, bucket_span
from lightning_n2uq.distributed.phases import ChunkMessage
from lightning_n2uq.utils.compat_fsdp import InFlight

Exact = Callable[[str, Tensor], bool]
"""From a parameter's name and the parameter to whether it travels in full precision."""


@dataclass(frozen=True)
class FlatLayout:
    """One rank's part of a flat tensor.

    Attributes:
        span: Its coordinates, with the ranges that travel in full precision.
        name: A name for the tensor, equal on all ranks and unlike that of any other tensor of a step.
        training: Whether any of its modules is in training mode.
    """

    span: Span
    name: str
    training: bool = True

    def rows(self, ranks: int, codec: Codec) -> list[ChunkMessage]:
        """Returns one message per rank about a flat tensor that holds the parts of all, in rank order."""
        numel, exact = self.span.numel, self.span.exact
        return [ChunkMessage.about(Span(rank * numel, numel, exact), codec) for rank in range(ranks)]

    def own(self, codec: Codec) -> ChunkMessage:
        """Returns the message about this part."""
        return ChunkMessage.about(self.span, codec)


def flat_layout(
    parameters: Sequence[InFlight] | None, numel: int, name_of: Callable[[nn.Module, str], str], exact: Exact
) -> FlatLayout:
    """Returns the layout of a flat tensor.

    Args:
        parameters: The parameters in it; None where nobody knows, so that all of it is quantized.
        numel: The coordinates of one rank's part.
        name_of: From a module and the name of one of its parameters to the name that users know.
        exact: Whether a parameter travels in full precision.
    """
    if not parameters:
        return FlatLayout(Span(0, numel), f"tensor of {numel}")
    places, start = [], 0
    for module, own_name, parameter, size in parameters:
        name = name_of(module, own_name)
        places.append(Place(name, Span(start, size), exact(name, parameter)))
        start += size
    return FlatLayout(bucket_span(places), places[0].name, any(p.module.training for p in parameters))


def stable_number(*parts: object) -> int:
    """Returns a 64-bit number for a tuple, the same in every process."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
