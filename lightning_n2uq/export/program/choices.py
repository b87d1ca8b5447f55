"""What a detector decides: which scores pass, which are the largest, which boxes are suppressed.

Like codes, these decisions are discrete: two scores that differ by a rounding change places, and the outputs
with them. So a trace keeps them, and a comparison of two ways of computing one network puts the decisions of
one into the other and asks by how much they are off by the other's own values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_n2uq.export.program.traces import chosen

_COMPARISONS = {"gt", "ge", "lt", "le", "__gt__", "__ge__", "__lt__", "__le__"}


class Choices(TorchFunctionMode):
    """Shows the open trace every comparison of floating values and every `topk` inside."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 -- whatever the function returns
        """Calls the function, and replaces what it decides where the trace says so."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _COMPARISONS and isinstance(args[0], Tensor) and args[0].is_floating_point():
            return chosen("comparison", result, lambda theirs: _passing(args[0], args[1], result, theirs))
        if name == "topk":
            return _largest(args[0], *result, *args[2:3], **(kwargs or {}))
        return result


def _passing(x: Tensor, bound: Tensor | float, own: Tensor, theirs: Tensor) -> float:
    """Returns how far values that pass for one side only lie from the bound."""
    if own.shape != theirs.shape:
        return float("inf")
    return _share(torch.where(own != theirs, (x - bound).abs(), 0.0), x)


def _largest(x: Tensor, values: Tensor, own: Tensor, dim: int = -1, **_: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Returns the largest values and their places; other places must hold the same values, in order."""

    def off(theirs: Tensor) -> float:
        same = own.shape == theirs.shape
        return _share((x.gather(dim, theirs) - values).abs(), x) if same else float("inf")

    places = chosen("topk", own, off)
    return (values, own) if places is own else (x.gather(dim, places), places)


def suppressed(boxes: Tensor, scores: Tensor, threshold: float, kept: Tensor) -> Tensor:
    """Shows the open trace which boxes are kept, best first, and returns those to go on with."""
    return chosen("suppression", kept, lambda theirs: _suppression(boxes, scores, threshold, theirs))


def _suppression(boxes: Tensor, scores: Tensor, threshold: float, kept: Tensor) -> float:
    """Returns by how much scores or coordinates must move, relative to the largest, to keep these boxes.

    Boxes are kept in the order of their scores, none overlaps one before it by more than the threshold, and
    every other box overlaps one of at least its score.
    """
    if not boxes.numel():
        return 0.0
    if not kept.numel():
        return float("inf")
    overlap = _overlap(boxes, boxes[kept], threshold)
    best, rest = scores[kept], torch.ones_like(scores, dtype=torch.bool)
    rest[kept] = False
    order = _share(best.diff().clamp(min=0), scores)
    twice = float(overlap[kept].triu(1).clamp(min=0).max())
    largest = scores.abs().max().clamp(min=torch.finfo(scores.dtype).tiny)
    behind = (scores[rest, None] - best) / largest
    missed = torch.maximum(-overlap[rest], behind).amin(1).clamp(min=0)
    last = float(missed.amax()) if missed.numel() else 0.0
    return float(torch.tensor([order, twice, last]).max())  # NaN is larger than everything


def _overlap(boxes: Tensor, others: Tensor, threshold: float) -> Tensor:
    """Returns by how much overlaps `[n, m]` exceed a threshold, as a share of the largest coordinate."""
    from torchvision.ops import box_iou

    size, other = boxes[:, 2:] - boxes[:, :2], others[:, 2:] - others[:, :2]
    side = torch.minimum(size.amin(1)[:, None], other.amin(1))
    over = box_iou(boxes, others).nan_to_num() - threshold
    return over * side / boxes.abs().max().clamp(min=torch.finfo(boxes.dtype).tiny)


def _share(difference: Tensor, x: Tensor) -> float:
    """Returns the largest difference relative to the largest magnitude."""
    if not difference.numel():
        return 0.0
    largest = float(x.abs().max())
    return float(difference.max()) / (largest or 1.0)
