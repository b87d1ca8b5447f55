"""The ramped staircase as a function of its thresholds, differentiable by autograd in every argument.

`threshold_quantize` hands out the gradients of the surrogate whatever its ramp width is. Here the gradient
follows the ramp itself; entropy penalties and annealing with ramp gradients are built on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_n2uq.ops.tables import WIDTH_FLOOR, compute_dtype, output_step
from lightning_n2uq.utils.validation import check_number


def staircase_position(
    x: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor, ramp: float = 1.0
) -> Tensor:
    """Returns `r_u(alpha x) / D` (docs/numerics.md): how many steps an input has climbed, `0 .. n`.

    At `u = 1` it is `h / D`, whose nearest integer is the code: `h` passes `k - 1/2` steps at `T_k`.

    Args:
        x: The input, of any shape, floating; computed in float32 (float64 for float64).
        start: The start `s`, 1 element.
        widths: The widths `a_k`, `[n]`; a width at or below the floor gets no gradient.
        scale_in: The input scale `alpha`, 1 element.
        ramp: The ramp width `u`, above 0 and up to 1.

    Returns:
        The position in shape of `x` and compute dtype; NaN where `x` is NaN. Its gradient is zero outside
        the ramps.

    Raises:
        ValueError: If `ramp` is out of range.
    """
    check_number("ramp", ramp, 0.0, 1.0, above=True)
    dtype = compute_dtype(x.dtype)
    widths = widths.to(dtype)
    width = torch.where(widths > WIDTH_FLOOR, widths, torch.full_like(widths, WIDTH_FLOOR))
    right = start.to(dtype).reshape(1) + torch.cumsum(width, 0)
    thresholds = right - width / 2
    scaled = x.to(dtype) * scale_in.to(dtype).reshape(())
    finished = torch.bucketize(scaled.detach(), right.detach()).clamp_max(widths.numel() - 1)
    open_ramp = (scaled - thresholds[finished]) / (ramp * width[finished]) + 0.5
    return finished + open_ramp.clamp(0.0, 1.0)


def ramp_quantize(
    x: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor, ramp: float
) -> Tensor:
    """Returns `beta * r_u(alpha x)`: the value of `threshold_quantize`, the gradients of the ramp itself.

    The narrower the ramps, the fewer inputs carry a gradient and the steeper it is. Arguments as for
    `threshold_quantize`; shape and dtype of `x`.
    """
    position = staircase_position(x, start, widths, scale_in, ramp)
    level = position * output_step(widths.numel())
    return (level * scale_out.to(level.dtype).reshape(())).to(x.dtype)
