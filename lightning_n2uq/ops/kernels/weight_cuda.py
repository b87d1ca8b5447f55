# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton kernel of the weight quantizer: division by the scale, clamp, rounding and scaling in one pass.

Equal bit for bit to `reference.quantize_weight`: divisions are the IEEE ones, no product is fused with a sum,
and adding and subtracting 1.5 * 2^23 (2^52 in float64) rounds half to even as `torch.round` does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_n2uq.ops.kernels.product_cuda import FUSED, divided, product

_TILE = 1024


@triton.jit
def _kernel(
    weight_ptr, quantized_ptr, scale_ptr, row_length, N: tl.constexpr, MAGIC: tl.constexpr, TILE: tl.constexpr
) -> None:
    """One tile of one channel; `scale` is in the compute dtype."""
    channel = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = column < row_length
    place = channel * row_length + column
    weight = tl.load(weight_ptr + place, mask=inside, other=0.0).to(scale_ptr.dtype.element_ty)
    scale = tl.zeros_like(weight) + tl.load(scale_ptr + channel)
    divisor = tl.where(scale == 0, 1.0, scale).to(scale.dtype)
    s, step = divided(weight, divisor), divided(scale, tl.zeros_like(scale) + N)
    s = tl.where(s < -1.0, -1.0, s).to(scale.dtype)
    s = tl.where(s > 1.0, 1.0, s).to(scale.dtype)
    half = tl.zeros_like(s) + N * 0.5
    rounded = product(s + 1.0, half) + MAGIC - MAGIC
    y = (rounded + rounded - N) * step
    tl.store(quantized_ptr + place, y.to(quantized_ptr.dtype.element_ty), mask=inside)


def forward(weight: Tensor, scale: Tensor, bits: int, quantized: Tensor) -> None:
    """Writes the quantized weights.

    Args:
        weight: `C * K` numbers in memory, channel after channel; any shape.
        scale: `[C]`, `S` of every channel, in the compute dtype.
        bits: 1 to 8.
        quantized: as many in the same order, dtype of `weight`.
    """
    if weight.numel() == 0:
        return
    channels = scale.numel()
    row_length = weight.numel() // channels
    magic = 1.5 * 2.0 ** (23 if scale.dtype == torch.float32 else 52)
    grid = channels, -(-row_length // _TILE)
    _kernel[grid](weight, quantized, scale, row_length, N=2**bits - 1, MAGIC=magic, TILE=_TILE, **FUSED)
