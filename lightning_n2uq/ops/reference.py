"""The reference: plain torch, as the papers write it. Every fast path is judged against this file.

Rules that must not be tidied:
- The comparison with a threshold is a strict `>`: an input equal to `T_k` keeps the lower code.
- Segment `k` of the surrogate is `t_{k-1} < x' <= t_k`; at or below `t_0` and above `t_n` it is flat.
- Thresholds and levels are computed in float64 and rounded once (`tables.py`); the input is scaled in the
  compute dtype (float32 for half precision).
- Weights round half to even; a weight's level is an odd integer times `S / n`, multiplied once.
- NaN in gives NaN out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_n2uq.ops.tables import (
    WIDTH_FLOOR,
    ThresholdTables,
    compute_dtype,
    output_step,
    threshold_tables,
)


def threshold_codes(scaled: Tensor, thresholds: Tensor) -> Tensor:
    """Returns `q = #{k : x' > T_k}`, int32, shape of `scaled`, one comparison at a time; NaN gives 0."""
    codes = torch.zeros(scaled.shape, dtype=torch.int32, device=scaled.device)
    for threshold in thresholds:
        codes += scaled > threshold
    return codes


def ramp_staircase(scaled: Tensor, tables: ThresholdTables) -> Tensor:
    """Returns `r_u(x') = sum_k D clamp((x' - T_k) / (u w_k) + 1/2, 0, 1)` for `0 < u <= 1`.

    The ramps of different steps do not overlap, so that the sum is `D * (finished ramps + the open one)`.
    """
    finished = torch.zeros_like(scaled)
    open_ramp = torch.zeros_like(scaled)
    for begin, slope in zip(tables.ramp_starts, tables.ramp_slopes, strict=True):
        ramp = (scaled - begin) * slope
        finished += ramp >= 1
        open_ramp = torch.where((ramp > 0) & (ramp < 1), ramp, open_ramp)
    step = output_step(tables.thresholds.numel())
    return (finished + open_ramp) * step


def threshold_quantize(
    x: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor, ramp: float = 0.0
) -> Tensor:
    """Returns the value of the activation quantizer (N2UQ, Eq. 3-5): shape and dtype of `x`, no gradient.

    Args:
        x: The input, of any shape, floating.
        start: The start `s`, 1 element.
        widths: The widths `a_1 .. a_n`, `[n]`.
        scale_in: The input scale `alpha`, 1 element.
        scale_out: The output scale `beta`, 1 element.
        ramp: The ramp width, 0 for the staircase, up to 1 for the surrogate.
    """
    tables = threshold_tables(start, widths, scale_in, scale_out, compute_dtype(x.dtype), ramp)
    scaled = x.detach().to(tables.knots.dtype) * tables.scale_in
    if ramp > 0:
        y = ramp_staircase(scaled, tables) * scale_out.detach().reshape(()).to(scaled.dtype)
    else:
        y = tables.outputs[threshold_codes(scaled, tables.thresholds).long()]
    return torch.where(scaled.isnan(), scaled, y).to(x.dtype)


def surrogate(x: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor) -> Tensor:
    """Returns `h(alpha x)` (N2UQ, Eq. 8-10), shape of `x`, differentiable by autograd in all arguments.

    Its gradients are those that the generalized straight-through estimator hands to the quantizer.
    """
    step = output_step(widths.numel())
    scaled = x * scale_in
    width = torch.where(widths > WIDTH_FLOOR, widths, torch.full_like(widths, WIDTH_FLOOR))
    left = start.reshape(())
    out = torch.zeros_like(scaled)
    for k in range(widths.numel()):
        segment = k * step + step / width[k] * (scaled - left)
        out = torch.where(scaled > left, segment, out)
        left = left + width[k]
    return torch.where(scaled > left, torch.full_like(out, 2.0), out)


def threshold_quantize_ste(
    x: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor, ramp: float = 0.0
) -> Tensor:
    """Quantizes with G-STE gradients through plain autograd: slow, and the judge of the custom operator.

    The value is `threshold_quantize`'s; gradients of `x, start, widths, scale_in` are those of
    `beta * h(alpha x)`; the gradient of `scale_out` uses the forward value.
    """
    one = torch.ones_like(scale_out)
    value = threshold_quantize(x, start, widths, scale_in, one, ramp)
    h = surrogate(x, start, widths, scale_in)
    return (value + (h - h.detach())) * scale_out


def weight_scale(weight: Tensor, bits: int) -> Tensor:
    """Returns `S = (2^b - 1) / 2^(b-1) * mean |W|` per channel (dim 0), `[C, 1, ..]`, in the compute dtype.

    The mean is taken in float64, so that the order of its sum does not show in float32.
    """
    dims = tuple(range(1, weight.dim()))
    mean = weight.detach().abs().mean(dim=dims, keepdim=True, dtype=torch.float64)
    return (mean * scale_factor(bits)).to(compute_dtype(weight.dtype))


def empty_scale(weight: Tensor) -> Tensor:
    """Returns room for what `weight_scale` returns."""
    size = (weight.shape[0],) + (1,) * (weight.dim() - 1)
    return weight.new_empty(size, dtype=compute_dtype(weight.dtype))


def scale_factor(bits: int) -> float:
    """Returns `(2^b - 1) / 2^(b-1)`, which `mean |W|` is multiplied by."""
    return 2.0 - 2.0 ** (1 - bits)


def weight_codes(weight: Tensor, bits: int) -> Tensor:
    """Returns odd integers `-n, -n + 2, .., n` (compute dtype) of the entropy-preserving weight quantizer."""
    return codes_of_scale(weight, weight_scale(weight, bits), bits)


def codes_of_scale(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Returns the odd integers nearest to `n W / scale`, halves to even; `scale` is `[C, 1, ..]`."""
    n = 2**bits - 1
    scaled = weight.detach().to(scale.dtype) / torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.round((scaled.clamp(-1, 1) + 1) * (n / 2)) * 2 - n


def quantize_weight(weight: Tensor, bits: int) -> Tensor:
    """Returns the value of the weight quantizer (N2UQ, Eq. 13-14): shape and dtype of `weight`.

    An output channel whose weights are all zero gives zeros (its scale is zero).
    """
    n = 2**bits - 1
    step = weight_scale(weight, bits) / n
    return (weight_codes(weight, bits) * step).to(weight.dtype)


def threshold_segment_sums(grad: Tensor, x: Tensor, tables: ThresholdTables) -> tuple[Tensor, Tensor]:
    """Returns sums over the inputs of each segment, from which all parameter gradients follow.

    Args:
        grad: The upstream gradient, shape of `x`.
        x: The quantizer's input.
        tables: The quantizer's tables; `knots.dtype` is the compute dtype.

    Returns:
        `sums`, `[n + 2, 2]` float64, with `sum g` and `sum g x` over segment `k` (at 0 and `n + 1`, the flat
        ends, the latter stays zero: their inputs may be infinite), a NaN input counted in segment `n` so that
        it reaches every parameter; and the 0-d float64 `sum g value`, `value` being `D q` or the ramp.
    """
    dtype = tables.knots.dtype
    grad, x = grad.detach().to(dtype), x.detach().to(dtype)
    scaled = x * tables.scale_in
    n = tables.thresholds.numel()
    segments = threshold_codes(scaled, tables.knots)
    segments[scaled.isnan()] = n
    sums = torch.zeros(n + 2, 2, dtype=torch.float64, device=x.device)
    for k in range(n + 2):
        inside = segments == k
        sums[k, 0] = grad[inside].double().sum()
        if k in (0, n + 1):
            continue
        sums[k, 1] = (grad[inside].double() * x[inside].double()).sum()
    if (tables.ramp_slopes > 0).any():
        value = ramp_staircase(scaled, tables)
    else:
        value = tables.levels[threshold_codes(scaled, tables.thresholds).long()]
    value = torch.where(scaled.isnan(), scaled, value)
    return sums, (grad.double() * value.double()).sum()


def threshold_input_gradient(grad: Tensor, x: Tensor, tables: ThresholdTables, scale_out: Tensor) -> Tensor:
    """Returns `g * (alpha beta) * slope(segment)`: shape and dtype of `x`; NaN where `x` is NaN."""
    dtype = tables.knots.dtype
    scaled = x.detach().to(dtype) * tables.scale_in
    gain = tables.scale_in * scale_out.detach().reshape(()).to(dtype)
    slope = (tables.slopes * gain)[threshold_codes(scaled, tables.knots).long()]
    slope = torch.where(scaled.isnan(), scaled, slope)
    return (grad.detach().to(dtype) * slope).to(x.dtype)


def quantize_weight_backward(grad: Tensor, weight: Tensor, bits: int, straight_through: bool) -> Tensor:
    """Returns the weight's gradient: `g / S` (published code), or `g` (straight-through); never clipped.

    A channel of zeros has no scale; there the gradient passes as it is, so that the channel can recover.
    """
    if straight_through:
        return grad.clone()
    scale = weight_scale(weight, bits)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (grad.to(scale.dtype) / scale).to(weight.dtype)
