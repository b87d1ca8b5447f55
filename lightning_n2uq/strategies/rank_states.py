"""What every rank has of its own when ranks train alone, in one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch.plugins import Precision
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

KEY = "nuqsgd_local"
"""The rounds' entry in a checkpoint."""


def own_parts(checkpoint: Mapping[str, Any], precision: Precision) -> dict[str, Any]:
    """Returns those parts of this rank's checkpoint in which ranks differ: optimizers and loss scaler."""
    return {
        "optimizer_states": checkpoint["optimizer_states"],
        "precision": checkpoint.get(_precision_key(precision)),
    }


def gather(own: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns all ranks' parts on rank 0, in order, nothing elsewhere. A collective call.

    Rank 0's optimizer states are where Lightning puts them, and not here a second time.
    """
    mine = apply_to_collection(dict(own), Tensor, lambda tensor: tensor.detach().cpu())
    if not dist.is_initialized():
        found = [mine]
    else:
        root = dist.get_rank() == 0
        mine = mine | ({"optimizer_states": None} if root else {})
        out: list[Any] | None = [None] * dist.get_world_size() if root else None
        dist.gather_object(mine, out, dst=0)
        found = out or []
    return [{name: part for name, part in rank.items() if part is not None} for rank in found]


def for_rank(ranks: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> dict[str, Any] | None:
    """Returns one rank's part; None where none was saved.

    With another number of ranks than saved every rank gets the mean of the saved weights, so that nothing
    of the present round is lost, and the optimizer of one of the saved ranks.

    Args:
        ranks: As `gather` returned them.
        rank: The rank of this process.
        world_size: The number of ranks of this run.
    """
    if not ranks:
        return None
    own = dict(ranks[rank % len(ranks)])
    if len(ranks) != world_size:
        rank_zero_warn(
            f"nuqsgd_local: what {len(ranks)} ranks had of their own is given to {world_size}: the mean of "
            f"their weights to all, the state of an optimizer to rank r from rank r modulo {len(ranks)}"
        )
        for part in ("parameters", "buffers"):
            own[part] = {name: _mean([saved[part][name] for saved in ranks]) for name in own[part]}
    return own


def put_back(checkpoint: dict[str, Any], own: Mapping[str, Any] | None, precision: Precision) -> None:
    """Replaces the parts in which ranks differ by this rank's."""
    if own is None:
        return
    if "optimizer_states" in own:
        checkpoint["optimizer_states"] = own["optimizer_states"]
    if "precision" in own:
        checkpoint[_precision_key(precision)] = own["precision"]


def warn_of_other_strategy() -> None:
    """Says that a checkpoint's exchange was another one."""
    rank_zero_warn(
        "nuqsgd_local: the checkpoint is of a strategy that exchanges gradients; its step counter and "
        "residuals are not used"
    )


def _mean(values: Sequence[Tensor]) -> Tensor:
    """Returns the mean of floating tensors, the first of others."""
    first = values[0]
    if not first.is_floating_point() or any(value.shape != first.shape for value in values):
        return first
    total = first.float() if first.element_size() < 4 else first.clone()
    for value in values[1:]:
        total = total + value
    return (total / len(values)).to(first.dtype)


def _precision_key(precision: Precision) -> str:
    """Returns under which name Lightning keeps a precision plugin's state."""
    return type(precision).__qualname__
