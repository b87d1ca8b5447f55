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
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

WIDTH_FLOOR = float(torch.tensor(1e-3, dtype=torch.float32))
"""Smallest width in use: float32(1e-3), also in float64, as in the published code."""

OUTPUT_RANGE = 2.0
"""The surrogate climbs from 0 to this value; the output step is `OUTPUT_RANGE / n`."""

Array: TypeAlias = Any  # of torch or of numpy
_KEPT = 512  # layers' tables
_NUMBERS = {torch.float32: np.float32, torch.float64: np.float64}


class QuantizerParameters(NamedTuple):
    """The parameters of a threshold quantizer with `n` steps, or their gradients.

    Attributes:
        start: `s`, 1 element.
        widths: `a_1 .. a_n`, `[n]`.
        scale_in: `alpha`, 1 element.
        scale_out: `beta`, 1 element.
    """

    start: Tensor
    widths: Tensor
    scale_in: Tensor
    scale_out: Tensor


class Tabled(Protocol):
    """Another quantizer that is a table of thresholds, and which the kernels can therefore run."""

    @property
    def scale_out(self) -> Tensor | None:
        """What the tables' slopes are multiplied by."""

    def tables(self, dtype: torch.dtype) -> ThresholdTables:
        """Returns the tables, rounded to `dtype`."""

    def gradients(self, sums: Tensor, value_sum: Tensor) -> Any:  # noqa: ANN401
        """Returns the parameters' gradients, as many as a `QuantizerParameters` has."""


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
    """Returns the dtype in which a quantizer computes: float64 for float64, float32 for every other one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_step(n_steps: int) -> float:
    """Returns `D = 2 / n`, the distance of two neighbouring output levels."""
    return OUTPUT_RANGE / n_steps


def floored_widths(widths: Tensor) -> Tensor:
    """Returns `w_k = max(a_k, WIDTH_FLOOR)` in shape and dtype of `widths`; NaN stays NaN."""
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
        start: The start `s`, 1 element.
        widths: The widths `a_1 .. a_n`, `[n]`.
        scale_in: The input scale `alpha`, 1 element.
        scale_out: The output scale `beta`, 1 element.
        dtype: The floating dtype of the result.
        ramp: The ramp width `u` in `[0, 1]`; 0 is the staircase, 1 the surrogate.
    """
    first, raw, alpha, beta = (p.detach().double() for p in (start, widths, scale_in, scale_out))
    fields = _fields(torch, first.reshape(1), raw.reshape(-1), alpha.reshape(()), beta.reshape(()), ramp)
    return ThresholdTables(*(field.to(dtype) for field in fields))


def operator_tables(
    quantizer: QuantizerParameters | Tabled, dtype: torch.dtype, ramp: float = 0.0
) -> ThresholdTables:
    """Returns `threshold_tables` with the same bits, by numpy on CPU and kept: nobody may write to them.

    Only for code inside operators, where tensors hold data.
    """
    if not isinstance(quantizer, QuantizerParameters):
        return quantizer.tables(dtype)
    if quantizer.widths.device.type != "cpu":
        return threshold_tables(*quantizer, dtype, ramp)
    return _host_tables(*map(_bits, quantizer), ramp, dtype)


def parameter_gradients(
    sums: Tensor, value_sum: Tensor, quantizer: QuantizerParameters | Tabled
) -> QuantizerParameters:
    """Returns the gradients of a quantizer's parameters from per-segment sums.

    Args:
        sums: Sums of `g` and of `g x` per segment, `[n + 2, 2]` float64 (`reference.threshold_segment_sums`).
        value_sum: The sum of `g value`, 0-d float64.
        quantizer: The parameters.
    """
    if not isinstance(quantizer, QuantizerParameters):
        return QuantizerParameters(*quantizer.gradients(sums, value_sum))
    if sums.device.type == "cpu":
        return _host_gradients(sums, value_sum, quantizer)
    tables = threshold_tables(*quantizer, torch.float64)
    beta = quantizer.scale_out.detach().double().reshape(())
    grads = _gradients(torch, sums, value_sum, tables, quantizer.widths.detach(), beta)
    pairs = zip(grads, quantizer, strict=True)
    return QuantizerParameters(*(g.reshape(p.shape).to(p.dtype) for g, p in pairs))


def _fields(xp: Array, start: Array, raw: Array, alpha: Array, beta: Array, ramp: float) -> tuple[Array, ...]:
    """Returns the fields of `ThresholdTables` in float64; `xp` is torch or numpy."""
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
    xp: Array, sums: Array, value: Array, tables: ThresholdTables, raw: Array, beta: Array
) -> tuple[Array, ...]:
    """Returns the gradients of start, widths and scales in float64; `xp` is torch or numpy.

    On segment `k`, `h = (k-1) D + (D / w_k) (alpha x - t_{k-1})` with `t_{k-1} = s + w_1 + .. + w_{k-1}`:
    the knots left of an input pull it down by the segment's slope, its own width by the slope times the
    share of the segment already climbed.
    """
    slope, grad_sum, grad_x_sum = tables.slopes[1:-1], sums[1:-1, 0], sums[1:-1, 1]
    visible = value - value  # NaN or infinity anywhere reaches every parameter
    pull = slope * grad_sum + visible
    climbed = tables.scale_in * grad_x_sum - tables.knots[:-1] * grad_sum
    right = pull.sum() - xp.cumsum(pull, 0)
    d_width = -beta * (right + slope * slope / output_step(slope.shape[0]) * climbed)
    d_scale_in = beta * (slope * grad_x_sum + visible).sum()
    return -beta * pull.sum(), xp.where(raw <= WIDTH_FLOOR, 0.0, d_width), d_scale_in, value


def _bits(values: Tensor) -> bytes:
    """Returns float64 values as bytes, which tell zeros apart and a NaN from no other."""
    return values.detach().double().numpy().tobytes()


def _number(bits: bytes) -> float:
    return float(np.frombuffer(bits)[0])


@lru_cache(maxsize=_KEPT)
@np.errstate(all="ignore")  # infinite or NaN parameters are the caller's to see, not to be warned of
def _host_arrays(
    start: bytes, widths: bytes, scale_in: bytes, scale_out: bytes, ramp: float
) -> ThresholdTables:
    raw: Array = np.frombuffer(widths)
    return ThresholdTables(
        *_fields(np, np.frombuffer(start), raw, _number(scale_in), _number(scale_out), ramp)
    )


@lru_cache(maxsize=_KEPT)
def _host_tables(
    start: bytes, widths: bytes, scale_in: bytes, scale_out: bytes, ramp: float, dtype: torch.dtype
) -> ThresholdTables:
    arrays, number = _host_arrays(start, widths, scale_in, scale_out, ramp), _NUMBERS[dtype]
    return ThresholdTables(*(torch.from_numpy(np.array(a, dtype=number)) for a in arrays))


@np.errstate(all="ignore")
def _host_gradients(sums: Tensor, value_sum: Tensor, quantizer: QuantizerParameters) -> QuantizerParameters:
    start, widths, scale_in, scale_out = map(_bits, quantizer)
    tables = _host_arrays(start, widths, scale_in, scale_out, 0.0)
    raw, beta, value = np.frombuffer(widths), quantizer.scale_out.item(), value_sum.item()
    d_start, d_widths, d_scale_in, _ = _gradients(np, sums.numpy(), value, tables, raw, beta)
    return QuantizerParameters(
        torch.full_like(quantizer.start, d_start),
        torch.from_numpy(d_widths).reshape(quantizer.widths.shape).to(quantizer.widths.dtype),
        torch.full_like(quantizer.scale_in, d_scale_in),
        torch.full_like(quantizer.scale_out, value),
    )
