"""The exchange's state in a checkpoint: one entry with all ranks' residuals, plain tensors and numbers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist

from lightning_n2uq.strategies.state import NUQSGDState

KEY = "nuqsgd"


def gather_state(state: NUQSGDState, device: torch.device) -> dict[str, Any] | None:
    """Collect the ranks' states on rank 0. A collective call.

    Args:
        state: Of this rank.
        device: On which the process group communicates.

    Returns:
        On rank 0 a dict of ``step``, ``seed``, ``names``, ``numels`` and ``residuals`` (fp32
        ``[world size, sum of numels]``), which ``torch.load(weights_only=True)`` reads; None elsewhere.
    """
    own = state.state_dict()
    names = sorted(own["residuals"])
    flat = torch.cat([own["residuals"][name] for name in names]) if names else torch.empty(0)
    rows = gather_rows(flat, device)
    if rows is None:
        return None
    return {
        "step": own["step"],
        "seed": own["seed"],
        "names": names,
        "numels": [own["residuals"][name].numel() for name in names],
        "residuals": rows,
    }


def gather_rows(row: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    """Return all ranks' rows (1-D, equally long, CPU) as the rows of one tensor on rank 0, None elsewhere."""
    root = dist.get_rank() == 0
    if row.numel() == 0:
        return torch.empty(dist.get_world_size(), 0) if root else None
    mine = row.to(device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())] if root else None
    dist.gather(mine, rows, dst=0)
    return None if rows is None else torch.stack(rows).cpu()


def state_for_rank(saved: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """Return one rank's part of what :func:`gather_state` returned.

    With another number of ranks than saved, every rank gets the mean of the saved residuals: the mean
    over ranks, which is what the parameters still miss, stays the same.

    Args:
        saved: From the checkpoint.
        rank: Of this process.
        world_size: Of this run.
    """
    rows = saved["residuals"]
    if len(rows) == world_size:
        row = rows[rank]
    else:
        row = rows.mean(dim=0)
        if rank == 0 and row.numel():
            warnings.warn(f"residuals of {len(rows)} ranks are averaged for {world_size} ranks", stacklevel=2)
    pieces = row.split(saved["numels"]) if saved["numels"] else ()
    residuals = dict(zip(saved["names"], pieces, strict=True))
    return {"step": saved["step"], "seed": saved["seed"], "residuals": residuals}
