# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton kernels of the weight quantizer: scale, clamp, rounding and scaling back; and the gradient.

Equal bit for bit to `reference.quantize_weight`: divisions are the IEEE ones, no product is fused with a sum,
and adding and subtracting 1.5 * 2^23 (2^52 in float64) rounds half to even as `torch.round` does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_n2uq.ops.backends.reference import weight as plain
from lightning_n2uq.ops.backends.triton.product import FUSED, divided, product
from lightning_n2uq.ops.layout import flat, flat_like, is_one_run
from lightning_n2uq.ops.reference import scale_factor

_TILE = 1024

levels = plain.levels  # integer convolutions on CUDA would want a kernel


@triton.jit
def _channel_scale(weight_ptr, row_length, FACTOR: tl.constexpr, TILE: tl.constexpr):
    """Returns `S` of the channel that begins at `weight_ptr`, float64."""
    total = tl.zeros([TILE], tl.float64)
    for first in range(0, row_length, TILE):
        column = first + tl.arange(0, TILE)
        weight = tl.load(weight_ptr + column, mask=column < row_length, other=0.0)
        total += tl.abs(weight.to(tl.float32)).to(tl.float64)
    return tl.sum(total, axis=0) / row_length * FACTOR


@triton.jit
def _divisor(scale):
    """Returns the scale; 1 for a channel of zeros, which has none."""
    return tl.where(scale == 0, 1.0, scale).to(scale.dtype)


@triton.jit
def _kernel(
    weight_ptr, quantized_ptr, scale_ptr, row_length,
    N: tl.constexpr, MAGIC: tl.constexpr, FACTOR: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """Quantizes one channel; `scale` is in the compute dtype, and is written if there is a `FACTOR`."""
    channel = tl.program_id(0).to(tl.int64)
    weight_ptr += channel * row_length
    quantized_ptr += channel * row_length
    if FACTOR > 0:
        known = _channel_scale(weight_ptr, row_length, FACTOR, TILE).to(scale_ptr.dtype.element_ty)
        tl.store(scale_ptr + channel, known)
    else:
        known = tl.load(scale_ptr + channel)
    for first in range(0, row_length, TILE):
        column = first + tl.arange(0, TILE)
        inside = column < row_length
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(known.dtype)
        scale = tl.zeros_like(weight) + known
        s, step = divided(weight, _divisor(scale)), divided(scale, tl.zeros_like(scale) + N)
        s = tl.where(s < -1.0, -1.0, s).to(scale.dtype)
        s = tl.where(s > 1.0, 1.0, s).to(scale.dtype)
        half = tl.zeros_like(s) + N * 0.5
        rounded = product(s + 1.0, half) + MAGIC - MAGIC
        y = (rounded + rounded - N) * step
        tl.store(quantized_ptr + column, y.to(quantized_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(grad_ptr, target_ptr, scale_ptr, row_length, TILE: tl.constexpr) -> None:
    """Divides one channel of the gradient by the scale."""
    channel = tl.program_id(0).to(tl.int64)
    known = tl.load(scale_ptr + channel)
    for first in range(0, row_length, TILE):
        column = first + tl.arange(0, TILE)
        inside, place = column < row_length, channel * row_length + column
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(known.dtype)
        quotient = divided(grad, _divisor(tl.zeros_like(grad) + known))
        tl.store(target_ptr + place, quotient.to(target_ptr.dtype.element_ty), mask=inside)


def quantize(weight: Tensor, scale: Tensor, bits: int, measure: bool, dtype: torch.dtype) -> Tensor:
    """Returns the quantized weight; see `reference.weight.quantize`."""
    quantized, channels = torch.empty_like(weight, dtype=dtype), scale.numel()
    if weight.numel() == 0:
        return quantized
    magic = 1.5 * 2.0 ** (23 if scale.dtype == torch.float32 else 52)
    _kernel[(channels,)](
        flat_like(weight.detach(), quantized), flat(quantized), scale, weight.numel() // channels,
        N=2**bits - 1, MAGIC=magic, FACTOR=scale_factor(bits) if measure else 0.0, TILE=_TILE, **FUSED,
    )  # fmt: skip
    return quantized


def gradient(grad: Tensor, scale: Tensor, dtype: torch.dtype, owned: bool) -> Tensor:
    """Returns `grad` divided by the scale; see `reference.weight.gradient`."""
    if not is_one_run(grad):
        return plain.gradient(grad, scale, dtype, owned)
    target = grad if owned and grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
    if grad.numel() > 0:
        channels = scale.numel()
        _gradient_kernel[(channels,)](grad, target, scale, grad.numel() // channels, TILE=_TILE, **FUSED)
    return target
