"""`threshold_quantize`: the activation quantizer of N2UQ as a custom operator with G-STE gradients.

The operator keeps its input for the backward pass and nothing else of that size. It computes in float32
(float64 for float64 input) whatever autocast says, and returns the input's dtype. Kernels are chosen by
`dispatch`; the judge of all is `reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_n2uq.ops.dispatch import load, select
from lightning_n2uq.ops.eager import differentiable, undispatched
from lightning_n2uq.ops.tables import QuantizerParameters, compute_dtype, threshold_tables
from lightning_n2uq.utils.validation import check

OP = "threshold_quantize"
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
        x: The input, of any shape; float16, bfloat16, float32 or float64.
        start: The start `s`, 1 element.
        widths: The widths `a_1 .. a_n`, `[n]` with `1 <= n <= 255`.
        scale_in: The input scale `alpha`, 1 element.
        scale_out: The output scale `beta`, 1 element.
        ramp: The ramp width `u` in `[0, 1]`: 0 is the staircase, 1 the surrogate; in between every step
            climbs linearly over a share `u` of its segment.

    Returns:
        The quantized input in shape, dtype and memory format of `x`; NaN where `x` is NaN.

    Raises:
        ValueError: If an argument has a wrong shape, dtype, device or range.

    Example:
        >>> one, w = torch.ones(1), torch.full((3,), 2 / 3)
        >>> threshold_quantize(torch.tensor([-1.0, 0.4, 1.2, 9.0]), torch.zeros(1), w, one, one)
        tensor([0.0000, 0.6667, 1.3333, 2.0000])
    """
    _check(x, start, widths, scale_in, scale_out, ramp)
    y: Tensor = _apply(x, start, widths, scale_in, scale_out, float(ramp), select(OP, x.device))
    return y


def threshold_codes(x: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor) -> Tensor:
    """Returns the codes `q = #{k : alpha x > T_k}` in `0 .. n`, uint8, shape of `x`; no gradient.

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
    check_floating("x", x)
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
    check(0.0 <= ramp <= 1.0, "ramp", ramp, "is 0 to 1")


def check_floating(name: str, x: Tensor) -> None:
    """Raises `ValueError` unless `x` has a dtype that the quantizers compute in or widen."""
    if x.dtype not in _FLOATS:
        raise ValueError(f"{name}: got dtype {x.dtype}, allowed are {', '.join(map(str, _FLOATS))}")


@torch.library.custom_op("lightning_n2uq::threshold_quantize", mutates_args=())
def _threshold_quantize(
    x: Tensor,
    start: Tensor,
    widths: Tensor,
    scale_in: Tensor,
    scale_out: Tensor,
    ramp: float,
    backend: str = "auto",
) -> Tensor:
    quantizer = QuantizerParameters(start, widths, scale_in, scale_out)
    y: Tensor = load(OP, x.device, backend).forward(x, quantizer, ramp)
    return y


@_threshold_quantize.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lightning_n2uq::threshold_quantize_backward", mutates_args=())
def _threshold_quantize_backward(
    grad: Tensor,
    x: Tensor,
    start: Tensor,
    widths: Tensor,
    scale_in: Tensor,
    scale_out: Tensor,
    ramp: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    quantizer = QuantizerParameters(start, widths, scale_in, scale_out)
    dx, gradients = load(OP, x.device, backend).backward(grad, x, quantizer, ramp)
    return dx, *gradients


@_threshold_quantize_backward.register_fake
def _(
    grad: Tensor, x: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor, *_: object
) -> tuple[Tensor, ...]:
    parameters = (start, widths, scale_in, scale_out)
    return torch.empty_like(x), *(
        torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters
    )


_gradients_of = undispatched(_threshold_quantize_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    *tensors, ctx.ramp, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    return *_gradients_of(grad, *ctx.saved_tensors, ctx.ramp, ctx.backend), None, None


_apply = differentiable(_threshold_quantize, _setup_context, _backward)
