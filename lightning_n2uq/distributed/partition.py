"""How a DDP bucket is cut: units for the pipeline, one chunk per rank, parameters sent in full precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Coordinates `[start, start + numel)` of a flat tensor.

    Attributes:
        start: The first coordinate.
        numel: How many coordinates; may be 0.
        exact: The `(offset, numel)` ranges, relative to `start`, that travel in full precision.
    """

    start: int
    numel: int
    exact: tuple[tuple[int, int], ...] = ()

    @property
    def stop(self) -> int:
        """The coordinate after the last."""
        return self.start + self.numel

    @property
    def slice(self) -> slice:
        """The coordinates as an index."""
        return slice(self.start, self.stop)

    def cut(self, start: int, numel: int) -> Span:
        """Returns `numel` coordinates from `start` on (relative to this span), with their exact ranges."""
        return Span(start, numel, clip_ranges(self.exact, start, numel))


def clip_ranges(ranges: Iterable[tuple[int, int]], start: int, numel: int) -> tuple[tuple[int, int], ...]:
    """Returns the parts of `ranges` inside `[start, start + numel)`, relative to `start` and merged."""
    clipped: list[tuple[int, int]] = []
    for offset, length in ranges:
        low, high = max(offset, start), min(offset + length, start + numel)
        if low >= high:
            continue
        if clipped and sum(clipped[-1]) == low - start:
            clipped[-1] = (clipped[-1][0], clipped[-1][1] + high - low)
        else:
            clipped.append((low - start, high - low))
    return tuple(clipped)


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in a bucket's flat buffer.

    Attributes:
        name: The parameter's name; its residual is kept under it, because DDP rebuilds its buckets.
        span: Its coordinates.
        exact: Whether it travels in full precision.
    """

    name: str
    span: Span
    exact: bool


def place_parameters(
    parameters: Sequence[Tensor], name_of: Callable[[Tensor], str], exact: Callable[[Tensor], bool]
) -> list[Place]:
    """Returns the places of a bucket's parameters, in the order of its buffer."""
    places, start = [], 0
    for parameter in parameters:
        places.append(Place(name_of(parameter), Span(start, parameter.numel()), exact(parameter)))
        start += parameter.numel()
    return places


def bucket_span(places: Sequence[Place]) -> Span:
    """Returns a bucket as a span with its exact ranges."""
    exact = tuple((place.span.start, place.span.numel) for place in places if place.exact)
    return Span(0, places[-1].span.stop if places else 0, exact)


def split_units(whole: Span, unit_numel: int, align: int) -> list[Span]:
    """Cuts a bucket into units for the pipeline; all but the last hold a multiple of `align`.

    Args:
        whole: The bucket.
        unit_numel: Wanted coordinates per unit.
        align: World size times codec bucket size, so that every rank's chunk of a full unit is equally long.
    """
    step = max(1, unit_numel // align) * align
    return [whole.cut(start, min(step, whole.numel - start)) for start in range(0, whole.numel, step)]


def split_chunks(unit: Span, parts: int, align: int) -> list[Span]:
    """Cuts a unit into one chunk per rank, at multiples of the codec's bucket size.

    Cutting elsewhere would split a codec bucket over two norms and change the bytes of the messages.
    The chunks' `start` is relative to the unit; trailing chunks of a small unit are empty.
    """
    blocks = -(-unit.numel // align)
    edges = [min(unit.numel, align * (blocks * part // parts)) for part in range(parts + 1)]
    return [unit.cut(low, high - low) for low, high in pairwise(edges)]
