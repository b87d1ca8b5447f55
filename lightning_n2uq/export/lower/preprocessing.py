"""Normalization as part of the exported network: uint8 pixels in, as they come from a file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.integer_steps import GridCodes
from lightning_n2uq.export.ir.steps import Input, Normalize, Step
from lightning_n2uq.export.runtime.numpy_engine import run_step


def normalization(
    name: str, inputs: tuple[str, ...], mean: tuple[float, ...], std: tuple[float, ...], pixel_scale: float
) -> Normalize:
    """Returns the step that normalizes pixels, whose arguments are those of `with_normalization`."""
    scale = np.float32(pixel_scale)
    offset, divisor = (np.asarray(values, np.float32) * scale for values in (mean, std))
    return Normalize(name, inputs, offset, divisor)


def _of_pixels(step: Step, normalize: Normalize) -> Step:
    """Returns a grid's step with thresholds of the 256 pixel values, if it reads the normalized images.

    The pixels are normalized in float32 as `Normalize` does it, so that the codes are the same.
    """
    if not isinstance(step, GridCodes) or step.inputs != (normalize.name,):
        return step
    images = np.broadcast_to(np.arange(256, dtype=np.uint8), (1, len(normalize.offset), 256))[..., None]
    codes = run_step(replace(step, inputs=()), run_step(normalize, images))[0, :, :, 0].astype(np.int64)
    places = np.arange(step.low + 1, step.high + 1)
    # The number of pixel values below each level; they grow with the code, as the divisor is positive.
    below = (codes[:, None, :] < places[None, :, None]).sum(2)
    turned = None if step.sign is None else np.broadcast_to(step.sign, len(codes)) < 0
    if turned is not None and turned.any():
        raise ValueError(f"{step.name}: its codes fall with the pixel, which has no form in integers")
    return replace(step, inputs=normalize.inputs, thresholds=(below - 1).astype(np.int32), sign=None)


def with_normalization(
    description: Description, mean: tuple[float, ...], std: tuple[float, ...], pixel_scale: float = 255.0
) -> Description:
    """Returns the same network behind `(pixel - mean * pixel_scale) / (std * pixel_scale)`.

    Where the network puts its images on a grid, the normalization goes into the grid's thresholds.

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
    pixels = Input("pixels", (), first.shape, "uint8")
    # The first step keeps its name, so that everybody who reads it stays as it is.
    normalized = normalization(first.name, (pixels.name,), mean, std, pixel_scale)
    notes = {
        "input": f"uint8 pixels, normalized inside: mean {list(mean)}, std {list(std)}, scale {pixel_scale}"
    }
    readers = [step for step in description.steps if first.name in step.inputs]
    if all(isinstance(step, GridCodes) for step in readers):
        steps = tuple(_of_pixels(step, normalized) for step in description.steps[1:])
        steps = (pixels, *steps)
    else:
        steps = (pixels, normalized, *description.steps[1:])
    return replace(description, steps=steps, metadata={**description.metadata, **notes})
