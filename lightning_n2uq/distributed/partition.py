"""How a flat gradient is cut: units for the pipeline, one chunk per rank, exact ranges inside chunks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Span:
    """Coordinates ``[start, start + numel)`` of a flat tensor.

    Attributes:
        start: First coordinate.
        numel: Number of coordinates; may be 0.
        exact: ``(offset, numel)`` ranges, relative to ``start``, that travel in full precision.
    """

    start: int
    numel: int
    exact: tuple[tuple[int, int], ...] = ()

    @property
    def stop(self) -> int:
        """Return the coordinate after the last."""
        return self.start + self.numel

    def cut(self, start: int, numel: int) -> Span:
        """Return ``numel`` coordinates from ``start`` on (relative to this span), with their exact ranges."""
        return Span(start, numel, clip_ranges(self.exact, start, numel))


def clip_ranges(ranges: Iterable[tuple[int, int]], start: int, numel: int) -> tuple[tuple[int, int], ...]:
    """Return the parts of ``ranges`` inside ``[start, start + numel)``, relative to ``start`` and merged."""
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


def split_units(whole: Span, unit_numel: int, align: int) -> list[Span]:
    """Cut a DDP bucket into pieces for the pipeline; all but the last hold a multiple of ``align``.

    Args:
        whole: The bucket.
        unit_numel: Wanted coordinates per piece.
        align: World size times codec bucket size, so that every rank's chunk of a full unit is equally long.
    """
    step = max(1, unit_numel // align) * align
    return [whole.cut(start, min(step, whole.numel - start)) for start in range(0, whole.numel, step)]


def split_chunks(unit: Span, parts: int, align: int) -> list[Span]:
    """Cut a unit into one chunk per rank, at multiples of the codec's bucket size.

    Cutting elsewhere would split a bucket's coordinates over two norms and change the bytes on the wire.
    The chunks' ``start`` is relative to the unit; trailing chunks of a small unit are empty.
    """
    blocks = -(-unit.numel // align)
    edges = [min(unit.numel, align * (blocks * part // parts)) for part in range(parts + 1)]
    return [unit.cut(low, high - low) for low, high in pairwise(edges)]


def offsets(sizes: Sequence[int]) -> list[int]:
    """Return where each of several consecutive pieces starts, and the total at the end."""
    edges = [0]
    for size in sizes:
        edges.append(edges[-1] + size)
    return edges
