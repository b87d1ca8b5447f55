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
from lightning_n2uq.ops.backends.numba.row_loops import store, target
from lightning_n2uq.ops.backends.numba.threshold_loops import BLOCK
from lightning_n2uq.ops.backends.reference.weight import gradient
from lightning_n2uq.ops.layout import flat, flat_like
from lightning_n2uq.ops.reference import empty_scale, scale_factor

__all__ = ["gradient", "levels", "quantize"]

SMALLEST = 65536  # weights per thread below which waking a thread costs more than it saves


def quantize(weight: Tensor, scale: Tensor, bits: int, measure: bool, dtype: torch.dtype) -> Tensor:
    """Returns the quantized weight; see `reference.weight.quantize`."""
    quantized = torch.empty_like(weight, dtype=dtype)
    if weight.numel() == 0:
        return quantized
    computed, channels, n = scale.dtype, scale.numel(), 2**bits - 1
    direct = dtype == computed or (dtype, computed) == (torch.bfloat16, torch.float32)
    result = quantized if direct else torch.empty_like(quantized, dtype=computed)
    scales = array(scale).reshape(-1)
    number = scales.dtype.type
    run_chunks(
        _channels,
        channels,
        max(1, SMALLEST * channels // weight.numel()),
        array(flat_like(weight.detach(), quantized).to(computed)).reshape(channels, -1),
        scales,
        scale_factor(bits) if measure else 0.0,
        number(n),
        number(1.5 * 2 ** (23 if computed == torch.float32 else 52)),
        array(flat(result)).reshape(channels, -1),
    )
    return quantized if direct else quantized.copy_(result)


def levels(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns odd integers and the scale; see `reference.weight.levels`."""
    source = weight.detach().contiguous().float()
    found, scale = torch.empty_like(source, dtype=torch.int8), empty_scale(source)
    if source.numel() == 0:
        return found, scale
    channels, n = scale.numel(), 2**bits - 1
    run_chunks(
        _level_channels,
        channels,
        max(1, SMALLEST * channels // source.numel()),
        array(source).reshape(channels, -1),
        array(scale).reshape(-1),
        scale_factor(bits),
        np.float32(n),
        np.float32(1.5 * 2**23),
        array(found).reshape(channels, -1),
    )
    return found, scale


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
    room = np.empty(BLOCK, weight.dtype)
    for channel in range(first, last):
        source = weight[channel]
        if factor > 0:
            scales[channel] = sum_of_magnitudes(source) / source.size * factor
        scale = scales[channel]
        step = scale / n
        scale = one if scale == 0 else scale
        for begin in range(0, source.size, BLOCK):
            end = min(begin + BLOCK, source.size)
            part, values = source[begin:end], target(quantized[channel], begin, end, room)
            for i in range(part.size):
                s = part[i] / scale
                s = -one if s < -one else s
                s = one if s > one else s
                rounded = (s + one) * half + magic - magic
                values[i] = (rounded * (one + one) - n) * step
            store(values, quantized[channel], begin)


@compiled
def _level_channels(
    first: int,
    last: int,
    weight: Array,
    scales: Array,
    factor: float,
    n: Number,
    magic: Number,
    levels: Array,
) -> None:
    """Writes levels and scales of the channels `first .. last - 1`; rounds as `_channels`."""
    one = n / n
    half = n / (one + one)
    for channel in range(first, last):
        source, target = weight[channel], levels[channel]
        scales[channel] = sum_of_magnitudes(source) / source.size * factor
        scale = scales[channel]
        scale = one if scale == 0 else scale
        for i in range(source.size):
            s = source[i] / scale
            s = -one if s < -one else s
            s = one if s > one else s
            rounded = (s + one) * half + magic - magic
            target[i] = np.int8(np.int32(rounded * (one + one) - n))
