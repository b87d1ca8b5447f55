"""The exchange's state in a checkpoint: one entry with all ranks' residuals, plain tensors and numbers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_n2uq.distributed.state import NUQSGDState

KEY = "nuqsgd"


def gather_state(state: NUQSGDState, device: torch.device) -> dict[str, Any] | None:
    """Collect the ranks' states on rank 0. A collective call.

    Args:
        state: Of this rank.
        device: On which the process group communicates.

    Returns:
        On rank 0 a dict that ``torch.load(weights_only=True)`` reads, None elsewhere: ``step``, ``seed``,
        ``layout``, ``geometry``, ``averaged``, ``names``, ``numels``, and fp32 tensors over all parameters:
        ``gradient`` and ``first_leg`` ``[world size, sum of numels]``, one row per rank, and
        ``second_leg`` ``[sum of numels]``, of which every rank keeps its own chunks. Those that are not
        owed have no columns.
    """
    own = state.state_dict()
    owed = own["owed"]
    legs: list[Mapping[str, Tensor]] = owed["legs"]
    names = sorted({name for residuals in (owed["gradient"], *legs) for name in residuals})
    numels = [_numel(name, (owed["gradient"], *legs)) for name in names]
    gradient = gather_rows(_flat(owed["gradient"], names, numels), device)
    first = gather_rows(_flat(legs[0] if legs else {}, names, numels), device)
    second = _sum(_flat(legs[1] if len(legs) > 1 else {}, names, numels), device)
    if gradient is None or first is None:
        return None
    return {
        "step": own["step"],
        "seed": own["seed"],
        "layout": owed["layout"],
        "geometry": owed["geometry"],
        "averaged": owed["averaged"],
        "names": names,
        "numels": numels,
        "gradient": gradient,
        "first_leg": first,
        "second_leg": second,
    }


def _numel(name: str, stores: Sequence[Mapping[str, Tensor]]) -> int:
    return next(store[name].numel() for store in stores if name in store)


def _flat(residuals: Mapping[str, Tensor], names: Sequence[str], numels: Sequence[int]) -> Tensor:
    """Return all parameters' residuals in one row, zero where there is none; empty without any."""
    if not residuals:
        return torch.empty(0)
    pieces = [
        residuals[name] if name in residuals else torch.zeros(numel)
        for name, numel in zip(names, numels, strict=True)
    ]
    return torch.cat(pieces)


def gather_rows(row: Tensor, device: torch.device) -> Tensor | None:
    """Return all ranks' rows (1-D, equally long, CPU) as the rows of one tensor on rank 0, None elsewhere."""
    root = dist.get_rank() == 0
    if row.numel() == 0:
        return torch.empty(dist.get_world_size(), 0) if root else None
    mine = row.to(device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())] if root else None
    dist.gather(mine, rows, dst=0)
    return None if rows is None else torch.stack(rows).cpu()


def _sum(row: Tensor, device: torch.device) -> Tensor:
    """Return the ranks' sum on rank 0. Where only one rank's number is not 0 the sum is that number."""
    total = row.to(device)
    if total.numel():
        dist.reduce(total, dst=0)
    return total.cpu()


def state_for_rank(saved: Mapping[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """Return one rank's part of what :func:`gather_state` returned.

    With another number of ranks than saved, every rank gets the mean of the saved residuals: the mean
    over ranks, which is what the parameters still miss, stays the same.

    Args:
        saved: From the checkpoint.
        rank: Of this process.
        world_size: Of this run.

    Raises:
        ValueError: If an earlier revision of this package saved it.
    """
    if "first_leg" not in saved:
        raise ValueError(
            f"ckpt_path: its entry {KEY!r} has {', '.join(map(str, saved))}; this version cannot resume it, "
            "allowed are checkpoints with 'first_leg'; --model.init_from takes its weights"
        )
    gradient, first, second = (saved[name] for name in ("gradient", "first_leg", "second_leg"))
    names, numels, averaged = saved["names"], saved["numels"], list(saved["averaged"])
    if len(gradient) == world_size:
        legs = [row for row in (first[rank], second) if row.numel()]
        owed = {
            "gradient": _by_name(gradient[rank], names, numels),
            "legs": [_by_name(row, names, numels) for row in legs],
            "averaged": averaged[: len(legs)],
            "layout": saved["layout"],
            "geometry": saved["geometry"],
        }
    else:
        mean = torch.zeros(sum(numels))
        for ranks, rows in ((1, gradient), (averaged[0] if averaged else 1, first)):
            if rows.numel():
                mean += ranks * rows.mean(dim=0)
        if second.numel():
            mean += averaged[1] * second / len(gradient)
        if rank == 0 and mean.any():
            warnings.warn(
                f"residuals of {len(gradient)} ranks are averaged for {world_size} ranks", stacklevel=2
            )
        owed = {
            "gradient": _by_name(mean, names, numels),
            "legs": [],
            "averaged": [],
            "layout": [],
            "geometry": {},
        }
    return {"step": saved["step"], "seed": saved["seed"], "owed": owed}


def _by_name(row: Tensor, names: Sequence[str], numels: Sequence[int]) -> dict[str, Tensor]:
    return dict(zip(names, row.split(numels), strict=True)) if row.numel() else {}
