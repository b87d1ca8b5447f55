"""The small tables from which every kernel of the threshold quantizer works, and its parameter gradients.

The quantizer's parameters (a start, `n` widths, two scales) become tables of at most `n + 2` numbers: knots,
thresholds, slopes, output levels. They are computed in float64 and rounded once, so that every backend
compares an input with the very same numbers.

The formulas are written once, for torch and for numpy. On CPU the operators use numpy: tables cost what their
calls cost, and a call of numpy is several times cheaper. A step needs a layer's tables three times, hence a
cache. `backends.triton.tables` has them as one kernel, since torch would launch twenty.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

WIDTH_FLOOR = float(torch.tensor(1e-3, dtype=torch.float32))
"""Smallest width in use: float32(1e-3), also in float64, as in the published code."""

OUTPUT_RANGE = 2.0
"""The surrogate climbs from 0 to this value; the output step is `OUTPUT_RANGE / n`."""

_KEPT = 512  # layers' tables
_NUMBERS = {torch.float32: np.float32, torch.float64: np.float64}


class QuantizerParameters(NamedTuple):
    """The parameters of a threshold quantizer with `n` steps, or their gradients.

    Attributes:
        start: 1 element, `s`.
        widths: `[n]`, `a_1 .. a_n`.
        scale_in: 1 element, `alpha`.
        scale_out: 1 element, `beta`.
    """

    start: Tensor
    widths: Tensor
    scale_in: Tensor
    scale_out: Tensor


class ThresholdTables(NamedTuple):
    """Tables of one quantizer with `n` steps, in the dtype in which inputs are compared.

    Attributes:
        scale_in: 0-d, `alpha`; inputs are compared as `alpha * x`.
        knots: `[n + 1]`, `t_0 .. t_n`.
        thresholds: `[n]`, `T_k = t_{k-1} + w_k / 2`.
        slopes: `[n + 2]`, `0, D / w_1, .., D / w_n, 0`: slope of the surrogate by segment index.
        ramp_starts: `[n]`, where the ramp of step `k` begins for ramp width `u`: `T_k - u w_k / 2`.
        ramp_slopes: `[n]`, `1 / (u w_k)`, or zeros when `u = 0`.
        levels: `[n + 1]`, `D * q` for `q = 0 .. n`, before the output scale.
        outputs: `[n + 1]`, `beta * D * q`, rounded once.
    """

    scale_in: Tensor
    knots: Tensor
    thresholds: Tensor
    slopes: Tensor
    ramp_starts: Tensor
    ramp_slopes: Tensor
    levels: Tensor
    outputs: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which a quantizer computes: float64 for float64, float32 for every other one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_step(n_steps: int) -> float:
    """`D = 2 / n`: the distance of two neighbouring output levels."""
    return OUTPUT_RANGE / n_steps


def floored_widths(widths: Tensor) -> Tensor:
    """`w_k = a_k` where `a_k > WIDTH_FLOOR`, the floor elsewhere; NaN stays NaN. Shape and dtype kept."""
    return torch.where(widths <= WIDTH_FLOOR, WIDTH_FLOOR, widths)


def threshold_tables(
    start: Tensor,
    widths: Tensor,
    scale_in: Tensor,
    scale_out: Tensor,
    dtype: torch.dtype,
    ramp: float = 0.0,
) -> ThresholdTables:
    """Computes the tables in float64 and rounds them to `dtype`; traceable, no gradient.

    Args:
        start: 1 element, `s`.
        widths: `[n]`, `a_1 .. a_n`.
        scale_in: 1 element, `alpha`.
        scale_out: 1 element, `beta`.
        dtype: Floating dtype of the result.
        ramp: Ramp width `u` in `[0, 1]`; 0 is the staircase, 1 the surrogate.
    """
    first, raw, alpha, beta = (p.detach().double() for p in (start, widths, scale_in, scale_out))
    fields = _fields(torch, first.reshape(1), raw.reshape(-1), alpha.reshape(()), beta.reshape(()), ramp)
    return ThresholdTables(*(field.to(dtype) for field in fields))


def operator_tables(quantizer: QuantizerParameters, dtype: torch.dtype, ramp: float = 0.0) -> ThresholdTables:
    """`threshold_tables` with the same bits, by numpy on CPU and kept: nobody may write to them.

    Only for code inside operators, where tensors hold data.
    """
    if quantizer.widths.device.type != "cpu":
        return threshold_tables(*quantizer, dtype, ramp)
    return _host_tables(*map(_bits, quantizer), ramp, dtype)


def parameter_gradients(
    sums: Tensor, value_sum: Tensor, quantizer: QuantizerParameters
) -> QuantizerParameters:
    """Gradients of a quantizer's parameters from per-segment sums.

    Args:
        sums: `[n + 2, 2]` float64: `sum g` and `sum g x` per segment (`reference.threshold_segment_sums`).
        value_sum: 0-d float64: `sum g value`.
        quantizer: The parameters; only for code inside operators, where tensors hold data.
    """
    if sums.device.type == "cpu":
        return _host_gradients(sums, value_sum, quantizer)
    tables = threshold_tables(*quantizer, torch.float64)
    raw, beta = quantizer.widths.detach(), quantizer.scale_out.detach().double().reshape(())
    grads = _gradients(torch, sums, value_sum, raw, tables.slopes, tables.knots, tables.scale_in, beta)
    return QuantizerParameters(
        *(g.reshape(p.shape).to(p.dtype) for g, p in zip(grads, quantizer, strict=True))
    )


def _fields(xp: Any, start: Any, raw: Any, alpha: Any, beta: Any, ramp: float) -> tuple[Any, ...]:  # noqa: ANN401
    """The fields of `ThresholdTables` in float64; `xp` is torch or numpy."""
    width = xp.where(raw <= WIDTH_FLOOR, WIDTH_FLOOR, raw)
    knots = xp.cumsum(xp.concatenate((start, width)), 0)
    thresholds = knots[:-1] + width / 2
    step, edge = output_step(raw.shape[0]), xp.zeros_like(width[:1])
    slopes = xp.concatenate((edge, (1.0 / width) * step, edge))
    # u = 1 has to give the knots themselves, not T_k - w_k / 2 with its own rounding.
    ramp_starts = knots[:-1] + width * ((1.0 - ramp) / 2)
    ramp_slopes = 1.0 / (ramp * width) if ramp > 0 else xp.zeros_like(width)
    levels = (xp.cumsum(xp.ones_like(knots), 0) - 1.0) * step
    return alpha, knots, thresholds, slopes, ramp_starts, ramp_slopes, levels, levels * beta


def _gradients(
    xp: Any,  # noqa: ANN401
    sums: Any,  # noqa: ANN401
    value: Any,  # noqa: ANN401
    raw: Any,  # noqa: ANN401
    slopes: Any,  # noqa: ANN401
    knots: Any,  # noqa: ANN401
    alpha: Any,  # noqa: ANN401
    beta: Any,  # noqa: ANN401
) -> tuple[Any, Any, Any, Any]:
    """Gradients of start, widths and scales in float64; `xp` is torch or numpy.

    On segment `k`, `h = (k-1) D + (D / w_k) (alpha x - t_{k-1})` with `t_{k-1} = s + w_1 + .. + w_{k-1}`:
    the knots left of an input pull it down by the segment's slope, its own width by the slope times the
    share of the segment already climbed.
    """
    slope, grad_sum, grad_x_sum = slopes[1:-1], sums[1:-1, 0], sums[1:-1, 1]
    visible = value - value  # NaN or infinity anywhere reaches every parameter
    pull = slope * grad_sum + visible
    climbed = alpha * grad_x_sum - knots[:-1] * grad_sum
    right = pull.sum() - xp.cumsum(pull, 0)
    d_width = -beta * (right + slope * slope / output_step(slope.shape[0]) * climbed)
    d_scale_in = beta * (slope * grad_x_sum + visible).sum()
    return -beta * pull.sum(), xp.where(raw <= WIDTH_FLOOR, 0.0, d_width), d_scale_in, value


def _bits(values: Tensor) -> bytes:
    """Float64 values by their bits, which tell zeros apart and a NaN from no other."""
    return values.detach().double().numpy().tobytes()


def _number(bits: bytes) -> float:
    return float(np.frombuffer(bits)[0])


@lru_cache(maxsize=_KEPT)
def _host_tables(
    start: bytes, widths: bytes, scale_in: bytes, scale_out: bytes, ramp: float, dtype: torch.dtype
) -> ThresholdTables:
    arrays, number = _arrays(start, widths, scale_in, scale_out, ramp), _NUMBERS[dtype]
    return ThresholdTables(*(torch.from_numpy(np.array(a, dtype=number)) for a in arrays))


@lru_cache(maxsize=_KEPT)
@np.errstate(all="ignore")  # infinite or NaN parameters are the caller's to see, not to be warned of
def _arrays(start: bytes, widths: bytes, scale_in: bytes, scale_out: bytes, ramp: float) -> tuple[Any, ...]:
    raw: npt.NDArray[np.float64] = np.frombuffer(widths)
    return _fields(np, np.frombuffer(start), raw, _number(scale_in), _number(scale_out), ramp)


@np.errstate(all="ignore")
def _host_gradients(sums: Tensor, value_sum: Tensor, quantizer: QuantizerParameters) -> QuantizerParameters:
    start, widths, scale_in, scale_out = quantizer
    bits = _bits(widths)
    alpha, knots, _, slopes, *_ = _arrays(_bits(start), bits, _bits(scale_in), _bits(scale_out), 0.0)
    raw, value = np.frombuffer(bits), value_sum.item()
    grads = _gradients(np, sums.numpy(), value, raw, slopes, knots, alpha, scale_out.item())
    return QuantizerParameters(
        torch.full(start.shape, grads[0], dtype=start.dtype),
        torch.from_numpy(grads[1]).reshape(widths.shape).to(widths.dtype),
        torch.full(scale_in.shape, grads[2], dtype=scale_in.dtype),
        torch.full(scale_out.shape, value, dtype=scale_out.dtype),
    )
