"""Small tables from which every kernel of the threshold quantizer works.

The quantizer's parameters (a start, `n` widths, two scales) are turned into tables of at most `n + 2`
numbers: knots, thresholds, slopes, output levels. They are computed in float64 and rounded once, so that
the oracle, the CPU kernels and the CUDA kernels compare an input with the very same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WIDTH_FLOOR = float(torch.tensor(1e-3, dtype=torch.float32))
"""Smallest width in use: float32(1e-3), also in float64, as in the published code."""

OUTPUT_RANGE = 2.0
"""The surrogate climbs from 0 to this value; the output step is `OUTPUT_RANGE / n`."""


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
    """Computes the tables in float64 and rounds them to `dtype`.

    Args:
        start: 1 element, `s`.
        widths: `[n]`, `a_1 .. a_n`.
        scale_in: 1 element, `alpha`.
        scale_out: 1 element, `beta`.
        dtype: floating dtype of the result.
        ramp: ramp width `u` in `[0, 1]`; 0 is the staircase, 1 the surrogate.
    """
    n = widths.numel()
    step = output_step(n)
    width = floored_widths(widths.detach().double().reshape(n))
    knots = torch.cumsum(torch.cat([start.detach().double().reshape(1), width]), 0)
    thresholds = knots[:-1] + width / 2
    edge = torch.zeros(1, dtype=torch.float64, device=widths.device)
    # u = 1 has to give the knots themselves, not T_k - w_k / 2 with its own rounding.
    ramp_starts = knots[:-1] + width * ((1.0 - ramp) / 2)
    ramp_slopes = 1.0 / (ramp * width) if ramp > 0 else torch.zeros_like(width)
    levels = torch.arange(n + 1, dtype=torch.float64, device=widths.device) * step
    tables = (
        scale_in.detach().double().reshape(()),
        knots,
        thresholds,
        torch.cat([edge, step / width, edge]),
        ramp_starts,
        ramp_slopes,
        levels,
        levels * scale_out.detach().double().reshape(()),
    )
    return ThresholdTables(*(table.to(dtype) for table in tables))
