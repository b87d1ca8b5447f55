"""torchvision's detectors as torch can trace them: the same boxes, without branches on how many there are."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from lightning_n2uq.export.program.choices import Choices, suppressed
from lightning_n2uq.utils.compat_torchvision import (
    DETECTION,
    POOL,
    POOLERS,
    box_coder,
    is_detector,
    pool_regions,
    regions_of_boxes,
)

_DECISIONS = {
    "rpn.RegionProposalNetwork": "filter_proposals",
    "roi_heads.RoIHeads": "postprocess_detections",
    "ssd.SSD": "postprocess_detections",
    "retinanet.RetinaNet": "postprocess_detections",
    "fcos.FCOS": "postprocess_detections",
}
"""The methods that select boxes, by class."""


@contextmanager
def traceable_detectors(model: nn.Module) -> Iterator[None]:
    """Replaces, inside, what stops torch from tracing torchvision's detectors; nothing for other networks.

    Decisions about boxes are shown to the open trace.
    """
    with ExitStack() as stack:
        for owner, name, new in _replacements() if is_detector(model) else ():
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, new)
        yield


def _replacements() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Yields owners and names with what takes their place."""
    pool_regions()
    yield importlib.import_module(POOLERS), POOL, pool
    yield box_coder(), "decode", decode
    for home in ("torchvision.ops", "torchvision.ops.boxes"):
        yield importlib.import_module(home), "batched_nms", batched_nms
    for place, method in _DECISIONS.items():
        module, _, kind = place.partition(".")
        owner = getattr(importlib.import_module(f"{DETECTION}.{module}"), kind)
        yield owner, method, _with_choices(getattr(owner, method))


def _with_choices(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def deciding(*arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401 -- as the method's
        with Choices():
            return method(*arguments, **keywords)

    return deciding


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Returns which boxes are kept, best first: `torchvision.ops.batched_nms` for any number of them.

    Each class lies beside the others, behind the largest coordinate.

    Args:
        boxes: `[n, 4]`.
        scores: `[n]`.
        idxs: The class of each box; only boxes of one class suppress each other.
        iou_threshold: The overlap above which the box with the lower score goes.
    """
    from torchvision.ops import nms

    end = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max() + 1  # no boxes have no largest coordinate
    apart = boxes + (idxs.to(boxes) * end)[:, None]
    return suppressed(apart, scores, iou_threshold, nms(apart, scores, iou_threshold))


def decode(self: Any, rel_codes: Tensor, boxes: Sequence[Tensor]) -> Tensor:  # noqa: ANN401 -- a `BoxCoder`
    """Returns the boxes `[n, classes, 4]` that a network's answers stand for, as `BoxCoder.decode` does."""
    found: Tensor = self.decode_single(rel_codes, torch.cat(list(boxes)))
    return found.unflatten(1, (-1, 4))


def pool(
    x_filtered: Sequence[Tensor],
    boxes: Sequence[Tensor],
    output_size: Sequence[int],
    sampling_ratio: int,
    scales: Sequence[float],
    mapper: Callable[[Sequence[Tensor]], Tensor],
) -> Tensor:
    """Pools regions from several feature maps, each from the map that its size asks for.

    Args:
        x_filtered: Feature maps `[images, channels, height, width]`.
        boxes: Boxes `[n, 4]` per image.
        output_size: Height and width of what is pooled.
        sampling_ratio: Points per bin along each axis.
        scales: Size of each map relative to the image.
        mapper: Gives the map of each box.
    """
    from torchvision.ops import roi_align

    regions, levels = regions_of_boxes(boxes), mapper(boxes)
    pooled = x_filtered[0].new_zeros((regions.shape[0], x_filtered[0].shape[1], *output_size))
    for level, (features, scale) in enumerate(zip(x_filtered, scales, strict=True)):
        (places,) = torch.where(levels == level)
        found = roi_align(features, regions[places], list(output_size), scale, sampling_ratio)
        pooled = pooled.index_put((places,), found)
    return pooled
