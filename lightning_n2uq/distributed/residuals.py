"""Residuals of error feedback: one rank's, by parameter, and all ranks' in one checkpoint.

The keys under which they are saved (`owed`, `legs`, `first_leg`, ...) are those of the first release.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_n2uq.distributed.exchange import BucketPlan

KEY = "nuqsgd"
"""The exchange's entry in a checkpoint."""

Layout = tuple[tuple[str, ...], ...]
"""The names of the parameters of every bucket, in the order of its buffer."""


@dataclass
class Residuals:
    """Residuals of one rank by parameter (fp32, flat), apart from those that a running exchange holds.

    A residual belongs to one phase of the exchange and is added to what that phase sends. Where buckets are
    laid out anew there is no such place; the residual is then pending: part of this rank's next gradient.

    Attributes:
        pending: What is added to this rank's next gradient.
        phases: For each phase that compresses, what is added to what it sends; zero where another rank does.
        averaged: For each of these phases, the number of ranks whose gradients' mean it sends.
        layout: The buckets' layout in which `phases` were kept; empty if unknown.
        geometry: The settings that decide which rank holds what of `phases`.
    """

    pending: dict[str, Tensor] = field(default_factory=dict)
    phases: list[dict[str, Tensor]] = field(default_factory=list)
    averaged: list[int] = field(default_factory=list)
    layout: Layout = ()
    geometry: dict[str, Any] = field(default_factory=dict)

    def make_pending(self) -> None:
        """Makes the phases' residuals pending: an error in a mean over `w` ranks `w` times.

        The mean over ranks of all pending residuals, which is what the parameters miss, stays the same.
        """
        for residuals, averaged in zip(self.phases, self.averaged, strict=True):
            for name, residual in residuals.items():
                start = self.pending.get(name)
                zero = torch.zeros_like(residual) if start is None else start
                self.pending[name] = zero.add(residual, alpha=averaged)
        self.phases, self.averaged = [], []

    def with_those_of(self, plans: Sequence[BucketPlan]) -> Residuals:
        """Returns these together with copies of the residuals that plans hold."""
        both = replace(self, pending=dict(self.pending), phases=[dict(phase) for phase in self.phases])
        for plan in plans:
            both.averaged = both.averaged or [phase.averaged for phase in plan.units[0].lossy_phases]
            both.phases = both.phases or [{} for _ in both.averaged]
            pending, phases = _zeros(plan), [_zeros(plan) for _ in both.phases]
            for unit in plan.units:
                if unit.pending is not None:
                    pending[unit.where].add_(unit.pending)
                for phase, flat in zip(unit.lossy_phases, phases, strict=False):
                    phase.export_residuals(flat[unit.where])
            if any(unit.pending is not None for unit in plan.units):
                both.pending |= _split(plan, pending)
            for store, flat in zip(both.phases, phases, strict=True):
                store |= _split(plan, flat)
        return both

    def move_into(self, plan: BucketPlan) -> None:
        """Moves the residuals of a bucket's parameters into its plan."""
        pending = _join(plan, self.pending)
        phases = [_join(plan, residuals) for residuals in self.phases]
        for unit in plan.units:
            if pending is not None:
                unit.pending = pending[unit.where]
            for phase, flat in zip(unit.lossy_phases, phases, strict=False):
                if flat is not None:
                    phase.import_residuals(flat[unit.where])

    def state_dict(self) -> dict[str, Any]:
        """Returns plain containers with copies on the CPU, which `torch.load(weights_only=True)` reads."""
        return {
            "gradient": _copies(self.pending),
            "legs": [_copies(phase) for phase in self.phases],
            "averaged": list(self.averaged),
            "layout": [list(names) for names in self.layout],
            "geometry": dict(self.geometry),
        }

    @staticmethod
    def restore(saved: Mapping[str, Any]) -> Residuals:
        """Returns what `state_dict` saved."""
        return Residuals(
            _copies(saved["gradient"]),
            [_copies(phase) for phase in saved["legs"]],
            [int(ranks) for ranks in saved["averaged"]],
            as_layout(saved["layout"]),
            dict(saved["geometry"]),
        )


def as_layout(buckets: Iterable[Iterable[str]]) -> Layout:
    """Returns the layout as tuples."""
    return tuple(tuple(names) for names in buckets)


def _copies(residuals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: residual.detach().to("cpu", copy=True) for name, residual in residuals.items()}


def _zeros(plan: BucketPlan) -> Tensor:
    return torch.zeros(plan.places[-1].span.stop, device=plan.units[0].device)


def _split(plan: BucketPlan, flat: Tensor) -> dict[str, Tensor]:
    """Returns copies of a bucket's residuals by parameter."""
    return {place.name: flat[place.span.slice].clone() for place in plan.places}


def _join(plan: BucketPlan, residuals: dict[str, Tensor]) -> Tensor | None:
    """Takes a bucket's parameters out of `residuals`; returns them as one tensor, None if there are none."""
    if not any(place.name in residuals for place in plan.places):
        return None
    flat = _zeros(plan)
    for place in plan.places:
        residual = residuals.pop(place.name, None)
        if residual is not None:
            flat[place.span.slice] = residual.to(flat.device)
    return flat


# All ranks' residuals in one checkpoint


def gather_state(own: Mapping[str, Any], device: torch.device) -> dict[str, Any] | None:
    """Collects the ranks' states on rank 0. A collective call.

    Args:
        own: This rank's, from `NUQSGDState.state_dict`.
        device: The device on which the process group communicates.

    Returns:
        On rank 0 a dict that `torch.load(weights_only=True)` reads, None elsewhere: `step`, `seed`, `layout`,
        `geometry`, `averaged`, `names`, `numels`, and fp32 tensors over all parameters: `gradient` (pending
        residuals) and `first_leg` `[world size, sum of numels]`, one row per rank, and `second_leg`
        `[sum of numels]`, of which every rank keeps its own chunks. Where there are no residuals a tensor has
        no columns.
    """
    owed = own["owed"]
    stores: list[Mapping[str, Tensor]] = [owed["gradient"], *owed["legs"], {}, {}][:3]
    numels = {name: residual.numel() for store in stores for name, residual in store.items()}
    names = sorted(numels)
    gradient, first, second = (_flat(store, names, numels) for store in stores)
    rows, first_rows, second = (
        _gather_rows(gradient, device),
        _gather_rows(first, device),
        _sum(second, device),
    )
    if rows is None or first_rows is None:
        return None
    return {
        "step": own["step"],
        "seed": own["seed"],
        "levels": own["levels"],
        "layout": owed["layout"],
        "geometry": owed["geometry"],
        "averaged": owed["averaged"],
        "names": names,
        "numels": [numels[name] for name in names],
        "gradient": rows,
        "first_leg": first_rows,
        "second_leg": second,
    }


def _flat(residuals: Mapping[str, Tensor], names: Sequence[str], numels: Mapping[str, int]) -> Tensor:
    """Returns all parameters' residuals in one row, zero where there is none; empty without any."""
    if not residuals:
        return torch.empty(0)
    return torch.cat([residuals[name] if name in residuals else torch.zeros(numels[name]) for name in names])


def _gather_rows(row: Tensor, device: torch.device) -> Tensor | None:
    """Returns all ranks' rows (1-D, equally long) as one CPU tensor on rank 0, None elsewhere."""
    root = dist.get_rank() == 0
    if row.numel() == 0:
        return torch.empty(dist.get_world_size(), 0) if root else None
    mine = row.to(device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())] if root else None
    dist.gather(mine, rows, dst=0)
    return None if rows is None else torch.stack(rows).cpu()


def _sum(row: Tensor, device: torch.device) -> Tensor:
    """Returns the ranks' sum on rank 0. Where only one rank's number is not 0 the sum is that number."""
    total = row.to(device)
    if total.numel():
        dist.reduce(total, dst=0)
    return total.cpu()


def state_for_rank(saved: Mapping[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """Returns one rank's part of what `gather_state` returned.

    With another number of ranks than saved, every rank gets the mean of the saved residuals: the mean
    over ranks, which is what the parameters still miss, stays the same.

    Args:
        saved: The entry of the checkpoint.
        rank: The rank of this process.
        world_size: The number of ranks of this run.

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
        mean = _mean_over_ranks(gradient, first, second, sum(numels), averaged)
        if rank == 0 and mean.any():
            warnings.warn(
                f"residuals of {len(gradient)} ranks are averaged for {world_size} ranks", stacklevel=2
            )
        owed = Residuals(_by_name(mean, names, numels)).state_dict()
    levels = saved.get("levels", [])
    return {"step": saved["step"], "seed": saved["seed"], "levels": levels, "owed": owed}


def _mean_over_ranks(
    gradient: Tensor, first: Tensor, second: Tensor, numel: int, averaged: Sequence[int]
) -> Tensor:
    """Returns the mean over ranks of all residuals, as pending ones."""
    mean = torch.zeros(numel)
    for ranks, rows in ((1, gradient), (averaged[0] if averaged else 1, first)):
        if rows.numel():
            mean += ranks * rows.mean(dim=0)
    if second.numel():
        mean += averaged[1] * second / len(gradient)
    return mean


def _by_name(row: Tensor, names: Sequence[str], numels: Sequence[int]) -> dict[str, Tensor]:
    return dict(zip(names, row.split(numels), strict=True)) if row.numel() else {}
