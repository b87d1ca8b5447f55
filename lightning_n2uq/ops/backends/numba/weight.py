"""CPU kernel (numba) of the weight quantizer: scale, clamp, rounding and scaling back, channel by channel.

Equal bit for bit to `reference.quantize_weight`; the sum of a scale is kept in float64, where its order does
not show in float32. A channel's weights are still in the cache when they are quantized. The gradient is one
division, for which torch needs no help.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.ops.backends.common.jit import Array, Number, array, compiled, run_chunks
from lightning_n2uq.ops.backends.reference.weight import gradient
from lightning_n2uq.ops.layout import flat, flat_like
from lightning_n2uq.ops.reference import scale_factor

__all__ = ["gradient", "quantize"]

SMALLEST = 65536  # weights per thread below which waking a thread costs more than it saves


def quantize(weight: Tensor, scale: Tensor, bits: int, measure: bool) -> Tensor:
    """Returns the quantized weight; see `reference.weight.quantize`."""
    quantized = torch.empty_like(weight)
    if weight.numel() == 0:
        return quantized
    dtype, channels, n = scale.dtype, scale.numel(), 2**bits - 1
    target = quantized if quantized.dtype == dtype else torch.empty_like(quantized, dtype=dtype)
    scales = array(scale).reshape(-1)
    number = scales.dtype.type
    run_chunks(
        _channels,
        channels,
        max(1, SMALLEST * channels // weight.numel()),
        array(flat_like(weight.detach(), quantized).to(dtype)).reshape(channels, -1),
        scales,
        scale_factor(bits) if measure else 0.0,
        number(n),
        number(1.5 * 2 ** (23 if dtype == torch.float32 else 52)),
        array(flat(target)).reshape(channels, -1),
    )
    return quantized if target is quantized else quantized.copy_(target)


@compiled
def sum_of_magnitudes(values: Array) -> float:
    """Returns the sum in float64, by eight sums side by side, which vector units hold."""
    a = b = c = d = e = f = g = h = 0.0
    whole = values.size // 8 * 8
    for i in range(0, whole, 8):
        a += abs(np.float64(values[i]))
        b += abs(np.float64(values[i + 1]))
        c += abs(np.float64(values[i + 2]))
        d += abs(np.float64(values[i + 3]))
        e += abs(np.float64(values[i + 4]))
        f += abs(np.float64(values[i + 5]))
        g += abs(np.float64(values[i + 6]))
        h += abs(np.float64(values[i + 7]))
    for i in range(whole, values.size):
        a += abs(np.float64(values[i]))
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@compiled
def _channels(
    first: int,
    last: int,
    weight: Array,
    scales: Array,
    factor: float,
    n: Number,
    magic: Number,
    quantized: Array,
) -> None:
    """Quantizes channels `first .. last - 1`; with a `factor`, finds their scales, too.

    Adding and subtracting `magic` rounds half to even, in vector units.
    """
    one = n / n
    half = n / (one + one)
    for channel in range(first, last):
        source, target = weight[channel], quantized[channel]
        if factor > 0:
            scales[channel] = sum_of_magnitudes(source) / source.size * factor
        scale = scales[channel]
        step = scale / n
        scale = one if scale == 0 else scale
        for i in range(source.size):
            s = source[i] / scale
            s = -one if s < -one else s
            s = one if s > one else s
            rounded = (s + one) * half + magic - magic
            target[i] = (rounded * (one + one) - n) * step
