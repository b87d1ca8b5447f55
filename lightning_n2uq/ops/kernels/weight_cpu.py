"""CPU kernel (numba) of the weight quantizer: division by the scale, clamp, rounding and scaling in one pass.

Equal bit for bit to `reference.quantize_weight`. The scale is the caller's, from torch's own mean: another
order of that sum would move weights across a rounding boundary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_n2uq.ops.kernels.jit import Array, Number, array, compiled, run_chunks

SMALLEST = 65536  # weights per thread below which waking a thread costs more than it saves


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
    dtype, channels, n = scale.dtype, scale.numel(), 2**bits - 1
    target = quantized if quantized.dtype == dtype else torch.empty_like(quantized, dtype=dtype)
    scales = array(scale)
    number = scales.dtype.type
    run_chunks(
        _channels,
        channels,
        max(1, SMALLEST * channels // weight.numel()),
        array(weight.to(dtype)).reshape(channels, -1),
        scales,
        number(n),
        number(1.5 * 2 ** (23 if dtype == torch.float32 else 52)),
        array(target).reshape(channels, -1),
    )
    if target is not quantized:
        quantized.copy_(target)


@compiled
def _channels(
    first: int,
    last: int,
    weight: Array,
    scales: Array,
    n: Number,
    magic: Number,
    quantized: Array,
) -> None:
    """Channels `first .. last - 1`. Adding and subtracting `magic` rounds half to even, in vector units."""
    one = n / n
    half = n / (one + one)
    for channel in range(first, last):
        source, target = weight[channel], quantized[channel]
        scale = scales[channel]
        step = scale / n
        scale = one if scale == 0 else scale
        for i in range(source.size):
            s = source[i] / scale
            s = -one if s < -one else s
            s = one if s > one else s
            rounded = (s + one) * half + magic - magic
            target[i] = (rounded * (one + one) - n) * step
