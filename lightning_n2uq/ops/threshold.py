"""`threshold_quantize`: the activation quantizer of N2UQ as a custom operator with G-STE gradients.

The operator keeps its input for the backward pass and nothing else of that size. It computes in float32
(float64 for float64 input) whatever autocast says, and returns the input's dtype. Kernels are chosen by
`dispatch`; the oracle is `reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_n2uq.ops import backends, reference
from lightning_n2uq.ops.eager import differentiable, undispatched
from lightning_n2uq.ops.host_tables import host_parameter_gradients, operator_tables
from lightning_n2uq.ops.layout import flat, flat_like
from lightning_n2uq.ops.tables import (
    WIDTH_FLOOR,
    compute_dtype,
    output_step,
    threshold_tables,
)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def threshold_quantize(
    x: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor, ramp: float = 0.0
) -> Tensor:
    """Quantizes by learned thresholds: `beta * D * #{k : alpha x > T_k}` (N2UQ, CVPR 2022, section 3).

    With `n` widths, `D = 2 / n`, `w_k = max(a_k, 1e-3)`, knots `t_0 = s`, `t_k = t_{k-1} + w_k` and
    thresholds `T_k = t_{k-1} + w_k / 2`.

    Gradients (generalized straight-through estimator): those of `x`, `start`, `widths`, `scale_in` are the
    gradients of `beta * h(alpha x)`, `h` being the piecewise linear surrogate through the knots; the
    gradient of `scale_out` uses the forward value. A width at or below 1e-3 gets none. `ramp` changes the
    forward value only.

    Args:
        x: any shape; float16, bfloat16, float32 or float64; CPU or CUDA.
        start: 1 element, `s`.
        widths: `[n]`, `a_1 .. a_n`, `1 <= n <= 255`.
        scale_in: 1 element, `alpha`.
        scale_out: 1 element, `beta`.
        ramp: ramp width `u` in `[0, 1]`: 0 is the staircase, 1 the surrogate, in between every step climbs
            linearly over a share `u` of its segment.

    Returns:
        Shape, dtype and memory format of `x`. NaN where `x` is NaN.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or range.

    Example:
        >>> one, w = torch.ones(1), torch.full((3,), 2 / 3)
        >>> threshold_quantize(torch.tensor([-1.0, 0.4, 1.2, 9.0]), torch.zeros(1), w, one, one)
        tensor([0.0000, 0.6667, 1.3333, 2.0000])
    """
    _check(x, start, widths, scale_in, scale_out, ramp)
    y: Tensor = _apply(x, start, widths, scale_in, scale_out, float(ramp))
    return y


def threshold_codes(x: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor) -> Tensor:
    """Integer codes `q = #{k : alpha x > T_k}` in `0 .. n`, uint8, shape of `x`; no gradient.

    A NaN input, which has no code, raises `ValueError`.
    """
    _check(x, start, widths, scale_in, scale_in, 0.0)
    if bool(x.isnan().any()):
        raise ValueError(f"x: {int(x.isnan().sum())} of {x.numel()} values are NaN, which has no code")
    tables = threshold_tables(start, widths, scale_in, scale_in, compute_dtype(x.dtype))
    scaled = x.detach().to(tables.knots.dtype) * tables.scale_in
    return torch.bucketize(scaled, tables.thresholds, out_int32=True).to(torch.uint8)


def _check(
    x: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor, ramp: float
) -> None:
    if x.dtype not in _FLOATS:
        raise ValueError(f"x: got dtype {x.dtype}, allowed are {', '.join(map(str, _FLOATS))}")
    if widths.dim() != 1 or not 1 <= widths.numel() <= 255:
        raise ValueError(f"widths: got shape {tuple(widths.shape)}, allowed is [n] with 1 <= n <= 255")
    scalars = {"start": start, "scale_in": scale_in, "scale_out": scale_out}
    for name, value in scalars.items():
        if value.numel() != 1:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, allowed is one element")
    for name, value in {**scalars, "widths": widths}.items():
        if value.device != x.device:
            raise ValueError(f"{name}: is on {value.device}, x is on {x.device}; move it there")
        if not value.dtype.is_floating_point:
            raise ValueError(f"{name}: got dtype {value.dtype}, allowed are floating dtypes")
    if not 0.0 <= ramp <= 1.0:
        raise ValueError(f"ramp: got {ramp}, allowed is 0 to 1")


@torch.library.custom_op("lightning_n2uq::threshold_quantize", mutates_args=())
def _threshold_quantize(
    x: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor, ramp: float
) -> Tensor:
    fast = backends.load("threshold_quantize", x.device)
    if fast is None:
        value = reference.threshold_quantize(x, start, widths, scale_in, scale_out, ramp)
        return torch.empty_like(x).copy_(value)
    y = torch.empty_like(x)
    fast.forward(flat_like(x, y), (start, widths, scale_in, scale_out), flat(y), ramp)
    return y


@_threshold_quantize.register_fake
def _(x: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor, ramp: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lightning_n2uq::threshold_quantize_backward", mutates_args=())
def _threshold_quantize_backward(
    grad: Tensor, x: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor, ramp: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    fast = backends.load("threshold_quantize", x.device)
    dx, quantizer = torch.empty_like(x), (start, widths, scale_in, scale_out)
    if fast is None:
        tables = operator_tables(*quantizer, compute_dtype(x.dtype), ramp)
        dx.copy_(reference.threshold_input_gradient(grad, x, tables, scale_out))
        sums, value_sum = reference.threshold_segment_sums(grad, x, tables)
        return dx, *parameter_gradients(sums, value_sum, *quantizer)
    return dx, *fast.backward(flat_like(grad, dx), flat_like(x, dx), quantizer, flat(dx), ramp)


@_threshold_quantize_backward.register_fake
def _(
    grad: Tensor, x: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor, ramp: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parameters = (start, widths, scale_in, scale_out)
    return torch.empty_like(x), *(  # type: ignore[return-value]
        torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters
    )


def parameter_gradients(
    sums: Tensor, value_sum: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `(start, widths, scale_in, scale_out)` from per-segment sums.

    On segment `k`, `h = (k-1) D + (D / w_k) (alpha x - t_{k-1})` with `t_{k-1} = s + w_1 + .. + w_{k-1}`:
    the knots left of an input pull it down by the segment's slope, its own width by the slope times the
    share of the segment already climbed.

    Args:
        sums: `[n + 2, 2]` float64: `sum g` and `sum g x` per segment (`reference.threshold_segment_sums`).
        value_sum: 0-d float64: `sum g value`.
        start: 1 element.
        widths: `[n]`.
        scale_in: 1 element.
        scale_out: 1 element.
    """
    if widths.device.type == "cpu":
        return host_parameter_gradients(sums, value_sum, start, widths, scale_in, scale_out)
    tables = threshold_tables(start, widths, scale_in, scale_out, torch.float64)
    n = widths.numel()
    slope, grad_sum, grad_x_sum = tables.slopes[1:-1], sums[1:-1, 0], sums[1:-1, 1]
    beta = scale_out.detach().double().reshape(())
    pull = slope * grad_sum
    pull = pull + (value_sum - value_sum)  # NaN or infinity anywhere reaches every parameter
    d_start = -beta * pull.sum()
    d_scale_in = beta * (slope * grad_x_sum + (value_sum - value_sum)).sum()
    climbed = tables.scale_in * grad_x_sum - tables.knots[:-1] * grad_sum
    right = pull.sum() - torch.cumsum(pull, 0)
    d_width = -beta * (right + slope * slope / output_step(n) * climbed)
    d_width = torch.where(widths.detach() <= WIDTH_FLOOR, torch.zeros_like(d_width), d_width)
    grads = (d_start, d_width, d_scale_in, value_sum)
    parameters = (start, widths, scale_in, scale_out)
    return tuple(g.reshape(p.shape).to(p.dtype) for g, p in zip(grads, parameters, strict=True))  # type: ignore[return-value]


_gradients_of = undispatched(_threshold_quantize_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    *tensors, ctx.ramp = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    return *_gradients_of(grad, *ctx.saved_tensors, ctx.ramp), None


_apply = differentiable(_threshold_quantize, _setup_context, _backward)
