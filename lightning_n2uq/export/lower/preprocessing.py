"""Normalization as part of the exported network: uint8 pixels in, as they come from a file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.steps import Input, Normalize


def with_normalization(
    description: Description, mean: tuple[float, ...], std: tuple[float, ...], pixel_scale: float = 255.0
) -> Description:
    """Returns the same network behind `(pixel - mean * pixel_scale) / (std * pixel_scale)`.

    Args:
        description: A network that takes float32 images.
        mean: Mean of each channel, in units of `pixel_scale`, as in the data modules.
        std: Standard deviation of each channel, in the same units.
        pixel_scale: The pixel value that stands for 1.

    Raises:
        ValueError: There are too many or too few channels, or a value is out of range.
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
