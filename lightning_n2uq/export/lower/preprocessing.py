"""Normalization as part of the exported network: uint8 pixels in, as they come from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.steps import Input, Normalize
from lightning_n2uq.export.runtime.torch_engine import run_step
from lightning_n2uq.export.verify.data import Batch


def with_normalization(
    description: Description, mean: tuple[float, ...], std: tuple[float, ...], pixel_scale: float = 255.0
) -> Description:
    """The same network behind `(pixel - mean * pixel_scale) / (std * pixel_scale)`.

    Args:
        description: a network of float32 images.
        mean: one value per channel, in units of `pixel_scale`, as in the data modules.
        std: likewise.
        pixel_scale: the pixel value that stands for 1.

    Raises:
        ValueError: wrong number of channels or a value out of range.
    """
    first = description.input
    channels = first.shape[0]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels or not np.isfinite(values).all():
            raise ValueError(f"{name}: got {list(values)}, allowed are {channels} finite numbers")
    if min(std) <= 0 or not (np.isfinite(pixel_scale) and pixel_scale > 0):
        raise ValueError(f"std, pixel_scale: got {list(std)}, {pixel_scale}; allowed are positive numbers")
    if first.dtype != "float32":
        raise ValueError("description: its images are normalized already")
    scale = np.float32(pixel_scale)
    offset, divisor = (np.asarray(values, np.float32) * scale for values in (mean, std))
    pixels = Input("pixels", (), first.shape, "uint8")
    # The first step keeps its name, so that everybody who reads it stays as it is.
    normalized = Normalize(first.name, (pixels.name,), offset, divisor)
    notes = {
        "input": f"uint8 pixels, normalized inside: mean {list(mean)}, std {list(std)}, scale {pixel_scale}"
    }
    steps = (pixels, normalized, *description.steps[1:])
    return replace(description, steps=steps, metadata={**description.metadata, **notes})


def normalizer(description: Description) -> Callable[[Tensor], Tensor]:
    """What the network does to pixels first, for the trained model that takes normalized images."""
    step = description.steps[1]
    arrays = {name: torch.from_numpy(array) for name, array in step.arrays().items()}
    return lambda pixels: run_step(step, arrays, False, pixels)


def to_pixels(batches: Iterator[Batch], description: Description) -> Iterator[Batch]:
    """Normalized images back to the uint8 pixels that they come from."""
    step = description.steps[1]
    offset, divisor = (array.reshape(-1, 1, 1) for array in step.arrays().values())
    for images, labels in batches:
        yield np.rint(images * divisor + offset).clip(0, 255).astype(np.uint8), labels
