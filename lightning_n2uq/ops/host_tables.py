"""Tables and parameter gradients of the threshold quantizer in numpy, for operators on CPU.

The tables have a few numbers each: what they cost is the number of calls, and a call of numpy is several
times cheaper than one of torch. Only for code inside operators, where tensors hold data.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_n2uq.ops import kernels
from lightning_n2uq.ops.tables import WIDTH_FLOOR, ThresholdTables, output_step, threshold_tables

_NUMBERS = {torch.float32: np.float32, torch.float64: np.float64}


def operator_tables(
    start: Tensor,
    widths: Tensor,
    scale_in: Tensor,
    scale_out: Tensor,
    dtype: torch.dtype,
    ramp: float = 0.0,
) -> ThresholdTables:
    """`threshold_tables`, the same bits: by numpy on CPU, in one launch where Triton runs."""
    if widths.device.type != "cpu":
        fast = kernels.load_tables(widths.device)
        make = threshold_tables if fast is None else fast.tables
        return make(start, widths, scale_in, scale_out, dtype, ramp)
    arrays = _arrays(start.item(), _double(widths), scale_in.item(), scale_out.item(), ramp)
    number = _NUMBERS[dtype]
    return ThresholdTables(*(torch.from_numpy(np.asarray(a, dtype=number)) for a in arrays))


def _double(widths: Tensor) -> npt.NDArray[np.float64]:
    values: npt.NDArray[np.float64] = widths.detach().double().reshape(-1).numpy()
    return values


@np.errstate(all="ignore")  # infinite or NaN parameters are the caller's to see, not to be warned of
def _arrays(
    start: float, widths: npt.NDArray[np.float64], scale_in: float, scale_out: float, ramp: float
) -> tuple[Any, ...]:
    """The fields of `ThresholdTables` in float64; the formulas of `threshold_tables`."""
    step = output_step(widths.size)
    width = np.where(widths <= WIDTH_FLOOR, WIDTH_FLOOR, widths)
    knots = np.cumsum(np.concatenate(([start], width)))
    slopes = np.zeros(width.size + 2)
    slopes[1:-1] = (1.0 / width) * step  # torch divides a number by a tensor in these two steps
    levels = np.arange(width.size + 1) * step
    ramp_slopes = 1.0 / (ramp * width) if ramp > 0 else np.zeros(width.size)
    ramp_starts = knots[:-1] + width * ((1.0 - ramp) / 2)
    thresholds = knots[:-1] + width / 2
    return scale_in, knots, thresholds, slopes, ramp_starts, ramp_slopes, levels, levels * scale_out


@np.errstate(all="ignore")
def host_parameter_gradients(
    sums: Tensor, value_sum: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`threshold.parameter_gradients`, with its arguments, on CPU."""
    raw, beta, alpha = _double(widths), scale_out.item(), scale_in.item()
    _, knots, _, slopes, *_ = _arrays(start.item(), raw, alpha, beta, 0.0)
    slope, table, value = slopes[1:-1], sums.numpy(), value_sum.item()
    grad_sum, grad_x_sum = table[1:-1, 0], table[1:-1, 1]
    visible = value - value  # NaN or infinity anywhere reaches every parameter
    pull = slope * grad_sum + visible
    climbed = alpha * grad_x_sum - knots[:-1] * grad_sum
    right = pull.sum() - np.cumsum(pull)
    d_width = -beta * (right + slope * slope / output_step(raw.size) * climbed)
    d_scale_in = beta * float((slope * grad_x_sum + visible).sum())
    return (
        torch.full(start.shape, -beta * float(pull.sum()), dtype=start.dtype),
        torch.from_numpy(np.where(raw <= WIDTH_FLOOR, 0.0, d_width)).reshape(widths.shape).to(widths.dtype),
        torch.full(scale_in.shape, d_scale_in, dtype=scale_in.dtype),
        torch.full(scale_out.shape, value, dtype=scale_out.dtype),
    )
