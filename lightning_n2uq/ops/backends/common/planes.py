"""What the backends on CPU share: the layout of maps, their batch norm, the format of packed codes.

A map `[N, C, ...]` is computed as planes, `[N, C, P]` in float32; a channels-last one as rows
(`common.rows`). The layout of results is that of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_n2uq.ops.backends.common.rows import from_rows, is_rows, rows
from lightning_n2uq.ops.backends.common.rows import packed_shape as packed_rows_shape
from lightning_n2uq.ops.formats.fused_activation import ChannelGradients, NormParameters, PReLUParameters
from lightning_n2uq.ops.tables import output_step


class PlaneNorm(NamedTuple):
    """The batch norm of one batch, `[C]` float32 each: `x * scale + shift`.

    Attributes:
        mean: Mean of the batch.
        inverse: `1 / sqrt(variance + eps)`.
        scale: `gamma * inverse`.
        shift: `beta - mean * scale`.
    """

    mean: Tensor
    inverse: Tensor
    scale: Tensor
    shift: Tensor


def kernel_map(x: Tensor, like: Tensor) -> Tensor:
    """Returns a map as kernels take it: rows `[R, C]` if the map `like` is channels-last, or else planes."""
    return rows(x) if is_rows(like) else planes(x)


def map_of(x: Tensor, size: Sequence[int]) -> Tensor:
    """Returns rows or planes as a map of that size again."""
    return from_rows(x, size) if x.dim() == 2 else x.reshape(size)


def planes(x: Tensor) -> Tensor:
    """Returns `[N, C, ...]` as contiguous `[N, C, P]` float32."""
    return x.detach().float().reshape(*x.shape[:2], -1).contiguous()


def empty_map(x: Tensor, dtype: torch.dtype, size: Sequence[int] | None = None) -> Tensor:
    """Returns an empty map in the memory order in which kernels leave it that work on `x`.

    Args:
        x: The map that the kernels work on.
        dtype: The dtype of the result.
        size: The shape of the result; None stands for that of `x`.
    """
    order = torch.channels_last if is_rows(x) else torch.contiguous_format
    return torch.empty(x.shape if size is None else size, dtype=dtype, device=x.device, memory_format=order)


def ordered(x: Tensor, like: Tensor) -> Tensor:
    """Returns a map of another operator in the memory order of the map `like`, its input."""
    return x.contiguous(memory_format=torch.channels_last) if is_rows(like) else x.contiguous()


def empty_rebuilt(packed: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns an empty map of that size in the memory order of the one whose codes these are."""
    order = torch.channels_last if packed.dim() == 2 else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device=packed.device, memory_format=order)


def measured_norm(
    x: Tensor, norm: NormParameters | None, statistics: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, PlaneNorm | None]:
    """Returns mean and biased variance, `[2, C]` float32, and the norm; `[2, 0]` and None without a norm.

    Args:
        x: Planes `[N, C, P]` float32, or rows `[R, C]`.
        norm: The norm's parameters, or None.
        statistics: Returns mean and biased variance of every channel, `[C]` float64.
    """
    if norm is None:
        return x.new_empty(2, 0, dtype=torch.float32), None
    stats = torch.stack(statistics(x)).float()
    return stats, known_norm(stats, norm)


def known_norm(stats: Tensor, norm: NormParameters) -> PlaneNorm:
    """Returns the norm that a batch's statistics give: forward and backward need the very same numbers."""
    mean, variance = stats.unbind(0)
    # sqrt would start MKL threads for a few numbers
    inverse = (variance.double() + norm.eps).pow(-0.5).float()
    scale = norm.gamma.detach().float() * inverse
    return PlaneNorm(mean, inverse, scale, norm.beta.detach().float() - mean * scale)


def channel_gradients(
    sums: Tensor, norm: PlaneNorm | None, parameters: NormParameters | None, act: PReLUParameters | None
) -> ChannelGradients:
    """Returns the gradients of a norm's and of a PReLU's parameters.

    Args:
        sums: `[C, 4]` float64; see `reference.fused_activation.backward_planes`.
        norm: The norm of this batch, or None.
        parameters: The norm's parameters, or None.
        act: PReLU's parameters, or None.
    """
    gamma = beta = bias_in = slope = bias_out = None
    if norm is not None and parameters is not None:
        gamma = (sums[:, 3] * norm.inverse.double()).to(parameters.gamma.dtype, copy=True)
        beta = sums[:, 0].to(parameters.beta.dtype, copy=True)
    if act is not None:
        pairs = zip(act, (sums[:, 0], sums[:, 1], sums[:, 2]), strict=True)
        bias_in, slope, bias_out = (grad.to(p.dtype, copy=True) for p, grad in pairs)
    return ChannelGradients(gamma, beta, bias_in, slope, bias_out)


def packed_bytes(pixels: int, bits: int) -> int:
    """Returns the bytes of a packed plane: `bits` bit planes of `ceil(pixels / 8)`, and a flag for NaN."""
    return bits * -(-pixels // 8) + 1


def packed_shape(x: Tensor, bits: int) -> list[int]:
    """Returns the shape of the packed codes of a map `[N, C, ...]`, two-dimensional for rows."""
    if is_rows(x):
        return packed_rows_shape(x.numel(), x.shape[1], bits)
    return [*x.shape[:2], packed_bytes(x.shape[2:].numel(), bits)]


def has_nan(packed: Tensor) -> bool:
    """Returns whether the packed codes are of a map with a NaN, which no code can say."""
    return bool(packed[..., -1].any())


def codes_for_backward(packed: Tensor) -> Tensor | None:
    """Returns None: the backward pass of the chain finds the codes again from its input."""
    return None


def output_table(scale_out: Tensor, bits: int) -> Tensor:
    """Returns `beta * D * q`, `[2^b]` float32: the `outputs` of `threshold_tables`.

    A uniform quantizer hands over all its levels in place of `scale_out`; they are returned.
    """
    if scale_out.numel() > 1:
        return scale_out
    n = 2**bits - 1
    levels = torch.arange(n + 1, dtype=torch.float64, device=scale_out.device) * output_step(n)
    return (levels * scale_out.detach().double().reshape(())).float()
