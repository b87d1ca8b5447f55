# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton kernel of the weight quantizer: division by the scale, clamp, rounding and scaling in one pass.

Equal bit for bit to `reference.quantize_weight`: division is the IEEE one, fused multiply-adds are off, and
adding and subtracting 1.5 * 2^23 (2^52 in float64) rounds half to even as `torch.round` does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024


@triton.jit
def _kernel(
    weight_ptr,
    quantized_ptr,
    divisor_ptr,
    step_ptr,
    n,
    magic,
    row_length,
    TILE: tl.constexpr,
) -> None:
    """One tile of one channel; `divisor` and `step` are in the compute dtype."""
    channel = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = column < row_length
    divisor, step = tl.load(divisor_ptr + channel), tl.load(step_ptr + channel)
    weight = tl.load(weight_ptr + channel * row_length + column, mask=inside, other=0.0).to(divisor.dtype)
    if divisor.dtype == tl.float32:
        s = tl.div_rn(weight, divisor + tl.zeros_like(weight))
    else:
        s = weight / divisor
    s = tl.where(s < -1.0, -1.0, s).to(divisor.dtype)
    s = tl.where(s > 1.0, 1.0, s).to(divisor.dtype)
    rounded = (s + 1.0) * (n * 0.5) + magic - magic
    y = (rounded * 2.0 - n) * step
    target = quantized_ptr + channel * row_length + column
    tl.store(target, y.to(quantized_ptr.dtype.element_ty), mask=inside)


def forward(weight: Tensor, scale: Tensor, bits: int, quantized: Tensor) -> None:
    """Writes the quantized weights.

    Args:
        weight: `[C * K]`, channel after channel.
        scale: `[C]`, `S` of every channel, in the compute dtype.
        bits: 1 to 8.
        quantized: `[C * K]`, dtype of `weight`.
    """
    if weight.numel() == 0:
        return
    n, channels = 2**bits - 1, scale.numel()
    row_length = weight.numel() // channels
    single = scale.dtype == torch.float32
    _kernel[(channels, triton.cdiv(row_length, _TILE))](
        weight,
        quantized,
        torch.where(scale == 0, 1.0, scale),
        scale / n,
        float(n),
        1.5 * 2.0 ** (23 if single else 52),
        row_length,
        TILE=_TILE,
        enable_fp_fusion=False,
    )
