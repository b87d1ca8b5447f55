"""Tables and parameter gradients of the threshold quantizer in numpy, for operators on CPU.

The tables have a few numbers each: what they cost is the number of calls, and a call of numpy is several
times cheaper than one of torch. A step needs a layer's tables three times, so the last ones are kept: nobody
may write to them. Only for code inside operators, where tensors hold data.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_n2uq.ops.tables import WIDTH_FLOOR, ThresholdTables, output_step, threshold_tables

_KEPT = 512  # layers' tables

_NUMBERS = {torch.float32: np.float32, torch.float64: np.float64}


def operator_tables(
    start: Tensor,
    widths: Tensor,
    scale_in: Tensor,
    scale_out: Tensor,
    dtype: torch.dtype,
    ramp: float = 0.0,
) -> ThresholdTables:
    """`threshold_tables`, the same bits: by numpy on CPU."""
    if widths.device.type != "cpu":
        return threshold_tables(start, widths, scale_in, scale_out, dtype, ramp)
    return _tables(_bits(start), _bits(widths), _bits(scale_in), _bits(scale_out), ramp, dtype)


def _bits(values: Tensor) -> bytes:
    """Float64 values by their bits, which tell zeros apart and a NaN from no other."""
    return values.detach().double().numpy().tobytes()


@lru_cache(maxsize=_KEPT)
def _tables(
    start: bytes, widths: bytes, scale_in: bytes, scale_out: bytes, ramp: float, dtype: torch.dtype
) -> ThresholdTables:
    arrays, number = _arrays(start, widths, scale_in, scale_out, ramp), _NUMBERS[dtype]
    return ThresholdTables(*(torch.from_numpy(np.array(a, dtype=number)) for a in arrays))


def _number(bits: bytes) -> float:
    return float(np.frombuffer(bits)[0])


@lru_cache(maxsize=_KEPT)
@np.errstate(all="ignore")  # infinite or NaN parameters are the caller's to see, not to be warned of
def _arrays(start: bytes, widths: bytes, scale_in: bytes, scale_out: bytes, ramp: float) -> tuple[Any, ...]:
    """The fields of `ThresholdTables` in float64; the formulas of `threshold_tables`."""
    raw: npt.NDArray[np.float64] = np.frombuffer(widths)
    step = output_step(raw.size)
    width = np.where(raw <= WIDTH_FLOOR, WIDTH_FLOOR, raw)
    knots = np.cumsum(np.concatenate((np.frombuffer(start), width)))
    slopes = np.zeros(width.size + 2)
    slopes[1:-1] = (1.0 / width) * step  # torch divides a number by a tensor in these two steps
    levels = np.arange(width.size + 1) * step
    ramp_slopes = 1.0 / (ramp * width) if ramp > 0 else np.zeros(width.size)
    ramp_starts = knots[:-1] + width * ((1.0 - ramp) / 2)
    thresholds = knots[:-1] + width / 2
    alpha, outputs = _number(scale_in), levels * _number(scale_out)
    return alpha, knots, thresholds, slopes, ramp_starts, ramp_slopes, levels, outputs


@np.errstate(all="ignore")
def host_parameter_gradients(
    sums: Tensor, value_sum: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`threshold.parameter_gradients`, with its arguments, on CPU."""
    bits = _bits(widths)
    raw, beta = np.frombuffer(bits), scale_out.item()
    alpha, knots, _, slopes, *_ = _arrays(_bits(start), bits, _bits(scale_in), _bits(scale_out), 0.0)
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
