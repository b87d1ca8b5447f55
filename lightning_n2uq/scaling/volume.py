"""Bytes that a rank hands to the collectives in one step, method by method."""

from __future__ import annotations

from functools import lru_cache

from lightning_n2uq.compression import Codec, NUQCodec
from lightning_n2uq.distributed.partition import Span, split_chunks, split_units
from lightning_n2uq.distributed.phases import padded

UNIT = 1 << 20
"""Coordinates per piece of the pipeline, as in `ExchangeConfig`."""


def all_reduce_bytes(nbytes: float, ranks: int) -> float:
    """Returns the bytes a rank sends in a ring all-reduce of `nbytes`: `2 (W-1)/W` of them."""
    return 2 * (ranks - 1) / ranks * nbytes


def ideal_two_phase_bytes(numel: int, bits: int, ranks: int, bucket_size: int = 1024) -> float:
    """Returns `2 (W-1)/W * numel * (b + 32/d) / 8`, which the two-phase scheme approaches."""
    return 2 * (ranks - 1) / ranks * numel * (bits + 32 / bucket_size) / 8


@lru_cache(maxsize=4096)
def two_phase_bytes(numel: int, bits: int, ranks: int, bucket_size: int = 1024) -> tuple[float, float, int]:
    """Returns the bytes of the slowest rank in both halves, and the number of units.

    Follows the exchange's own cuts, so that what rounding to whole buckets costs on many ranks shows:
    a unit holds at least one bucket for every rank, and the all-gather sends equally long messages.

    Args:
        numel: Coordinates, in one DDP bucket.
        bits: Of both halves.
        ranks: That take part.
        bucket_size: Coordinates per norm.
    """
    return exchange_bytes(numel, NUQCodec(bits, bucket_size), ranks, bucket_size)


def exchange_bytes(numel: int, codec: Codec, ranks: int, bucket_size: int) -> tuple[float, float, int]:
    """Returns what `two_phase_bytes` does, of any codec.

    Args:
        numel: Coordinates, in one DDP bucket.
        codec: Of both halves.
        ranks: That take part.
        bucket_size: Coordinates at whose multiples chunks are cut.
    """
    if ranks == 1:
        return 0.0, 0.0, 0
    units = split_units(Span(0, numel), UNIT, bucket_size * ranks)
    first = second = 0.0
    for unit in units:
        sizes = [padded(codec.nbytes(chunk.numel)) for chunk in split_chunks(unit, ranks, bucket_size)]
        first += sum(sizes) - min(sizes)
        second += max(sizes) * (ranks - 1)
    return first, second, len(units)


def all_gather_bytes(numel: int, bits: int, ranks: int) -> float:
    """Returns what the paper's scheme sends: the whole message to every other rank."""
    return (ranks - 1) * NUQCodec(bits).nbytes(numel)


def shapes(numel: int) -> list[tuple[int, ...]]:
    """Returns parameter shapes of ResNet-18's layers with about `numel` coordinates in all."""
    found: list[tuple[int, ...]] = []
    total = 0
    while True:
        for width, below in ((64, 64), (128, 64), (256, 128), (512, 256)):
            for fan_in in (below, width, width, width):
                if total >= numel:
                    return found
                found += [(width, fan_in, 3, 3), (width,), (width,)]
                total += width * fan_in * 9 + 2 * width


def powersgd_numel(numel: int, rank: int = 1) -> int:
    """Returns the coordinates torch's PowerSGD reduces for the netlab's layers (those of ResNet-18).

    A weight of `n` rows and `m` columns becomes `rank (n + m)` numbers; 1-D parameters stay whole.
    """
    total = 0
    for rows, *others in shapes(numel):
        columns = 1
        for size in others:
            columns *= size
        total += rank * (rows + columns) if others else rows
    return total
