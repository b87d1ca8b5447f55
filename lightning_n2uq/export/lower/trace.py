"""From a trained network to its `Description`.

Networks of this package are walked by their structure; any other one (`quantize_model`'s, torchvision's,
timm's) is traced with torch.fx, layer modules being its leaves. A layer without a deployed form stops the
export with its name and kind.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

import lightning_n2uq.export.lower.backbones  # noqa: F401 -- registers this package's networks
from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.steps import Input
from lightning_n2uq.export.lower import layers
from lightning_n2uq.export.lower.builder import Builder
from lightning_n2uq.export.lower.fx import trace_with_fx
from lightning_n2uq.export.lower.sign_folding import fold_signs


@torch.no_grad()
def describe(
    model: nn.Module, image_shape: tuple[int, int, int], metadata: Mapping[str, str] | None = None
) -> Description:
    """Derives the deployed network from a trained one; the model is left as it is.

    Args:
        model: A network of this package, one made by `quantize_model`, or a module with one as `backbone`.
            Its evaluation behaviour is exported whatever mode it is in.
        image_shape: Shape `(C, H, W)` of the images.
        metadata: Texts to keep with the network.

    Raises:
        ValueError: A layer or operation has no deployed form; the message names it.
    """
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape: got {image_shape!r}, allowed is (channels, height, width)")
    model = getattr(model, "backbone", model)
    builder = Builder()
    images = builder.output(Input("images", (), tuple(image_shape)))
    if layers.is_known(model) and not isinstance(model, nn.Sequential):  # it may hold what has to be traced
        logits = layers.apply(model, builder, images, "")
    else:
        logits = trace_with_fx(model, builder, images)
    builder.value(logits)
    return Description(fold_signs(builder.steps), dict(metadata or {}), tuple(builder.folds))
