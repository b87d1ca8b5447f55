"""Before the first message: all ranks show their settings, and all stop if two disagree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from lightning_n2uq.distributed.collectives import all_gather

_RECORD_BYTES = 4096


def exchange_records(
    record: Mapping[str, Any], group: dist.ProcessGroup | None, device: torch.device
) -> list[dict[str, Any]]:
    """Return every rank's record, in rank order.

    The records travel as fixed-size bytes, so that ranks which disagree about everything else still
    agree about the size of this message, and nothing is unpickled.

    Raises:
        ValueError: If the record does not fit.
    """
    text = json.dumps(record).encode()
    if len(text) > _RECORD_BYTES:
        raise ValueError(f"`skip_patterns` and `levels` must fit into {_RECORD_BYTES} bytes, got {len(text)}")
    size = dist.get_world_size(group)
    mine = torch.zeros(_RECORD_BYTES, dtype=torch.uint8)
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    theirs = torch.empty(size * _RECORD_BYTES, dtype=torch.uint8, device=device)
    all_gather(theirs, mine.to(device), group, async_op=False)
    rows = theirs.cpu().view(size, _RECORD_BYTES)
    return [json.loads(bytes(row.tolist()).rstrip(b"\0")) for row in rows]


def require_agreement(records: list[dict[str, Any]], ranks: list[int]) -> None:
    """Raise the same error on every rank if two ranks disagree.

    Args:
        records: Settings of every rank.
        ranks: Their numbers.

    Raises:
        ValueError: Names the first setting that differs and its two values.
    """
    reference = records[0]
    for rank, record in zip(ranks[1:], records[1:], strict=True):
        for name in [*reference, *(record.keys() - reference.keys())]:
            if reference.get(name) != record.get(name):
                raise ValueError(
                    f"ranks disagree on `{name}`: rank {ranks[0]} has {reference.get(name)!r}, "
                    f"rank {rank} has {record.get(name)!r}"
                )
