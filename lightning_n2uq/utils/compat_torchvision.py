"""Names of torchvision that are not public, each behind one function here; the rules are those of `compat`.

torchvision is imported at the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_n2uq.utils.compat import private

DETECTION = "torchvision.models.detection"
"""The package of torchvision's detectors and their parts."""

POOLERS = "torchvision.ops.poolers"
POOL = "_multiscale_roi_align"
"""The function by which `MultiScaleRoIAlign` pools, and its module."""


def is_detector(model: nn.Module) -> bool:
    """Returns whether a network is, or holds, a detector of torchvision or a part of one; imports nothing."""
    kinds = {base for module in model.modules() for base in type(module).__mro__}
    return any(kind.__module__.startswith(f"{DETECTION}.") for kind in kinds)


def box_coder() -> Any:  # noqa: ANN401 -- torchvision has no types
    """Returns the class that turns a network's answers into boxes, by its method `decode`."""
    coder = private(f"{DETECTION}._utils", "BoxCoder")
    private(coder, "decode")
    private(coder, "decode_single")
    return coder


def pool_regions() -> Callable[..., Tensor]:
    """Returns the function that pools regions from several feature maps, the level by a region's size."""
    pool: Callable[..., Tensor] = private(POOLERS, POOL)
    return pool


def regions_of_boxes(boxes: Sequence[Tensor]) -> Tensor:
    """Returns boxes `[n, 4]` of every image as rows `(image, left, top, right, bottom)`."""
    regions: Tensor = private(POOLERS, "_convert_to_roi_format")(boxes)
    return regions
