"""`integer_conv2d` and `integer_linear`: uint8 codes times int8 levels, exact sums, one scale per channel.

This is the arithmetic that uniform quantizers promise: codes and levels are integers, their products are
added exactly, and one number per output channel turns the sum into what the float layer computes. The sum is
rounded to float32 once, multiplied by the scale in float32, then the bias is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_n2uq.ops.dispatch import Backend, load, select
from lightning_n2uq.ops.eager import undispatched
from lightning_n2uq.ops.formats.integer import IntegerRange, Prepared
from lightning_n2uq.utils.compat import constant_in_graphs
from lightning_n2uq.utils.validation import check, check_integer

OP = "integer"
LARGEST_CODE, LARGEST_LEVEL = 255, 128
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class IntegerGeometry(NamedTuple):
    """The arguments of `torch.nn.functional.conv2d` behind the bias: pairs, and the number of groups."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1


def integer_conv2d(
    codes: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    largest_code: int = LARGEST_CODE,
    largest_level: int = LARGEST_LEVEL,
) -> Tensor:
    """Returns `scale * conv2d(codes, levels) + bias` with exact sums; no gradient.

    Args:
        codes: `[N, C_in, H, W]` uint8, contiguous or channels-last (others are copied).
        levels: `[C_out, C_in / groups, kH, kW]` int8.
        scale: One number per output channel, `[C_out]`; used as float32.
        bias: `[C_out]`, added in float32; None for none.
        stride: Step of the kernel.
        padding: Code 0 around the map.
        dilation: Spacing between the kernel's elements.
        groups: Number of groups into which the channels are split.
        dtype: The result's dtype: float32, bfloat16 or float16, rounded to at the end.
        largest_code: No code is larger: a promise, which lets more processors use their fast instructions.
        largest_level: No level's magnitude is larger: likewise.

    Returns:
        `[N, C_out, H', W']` in the memory format of `codes`.

    Raises:
        ValueError: If an argument has a wrong shape, dtype or value.

    Example:
        >>> codes, levels = torch.full((1, 2, 1, 1), 3, dtype=torch.uint8), torch.ones(1, 2, 1, 1).char()
        >>> integer_conv2d(codes, levels, torch.tensor([0.5]))
        tensor([[[[3.]]]])
    """
    _check(codes, levels, scale, bias, dtype, largest_code, largest_level)
    check(codes.dim() == 4 and levels.dim() == 4, "codes", tuple(codes.shape), "is [N, C, H, W]")
    fits = groups > 0 and codes.shape[1] == levels.shape[1] * groups and levels.shape[0] % groups == 0
    check(fits, "levels", tuple(levels.shape), f"fits {codes.shape[1]} channels in {groups} groups")
    geometry = IntegerGeometry(_pair(stride), _pair(padding), _pair(dilation), groups)
    backend = exact_backend(codes.device, largest_code, largest_level, levels[0].numel())
    numbers = scale.detach().float(), None if bias is None else bias.detach().float()
    y: Tensor = conv2d_operator(codes, levels, *numbers, *geometry, dtype, backend)
    return y


def integer_linear(
    codes: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    largest_code: int = LARGEST_CODE,
    largest_level: int = LARGEST_LEVEL,
) -> Tensor:
    """Returns `scale * linear(codes, levels) + bias` with exact sums; no gradient.

    Args:
        codes: `[..., in]` uint8.
        levels: `[out, in]` int8.
        scale: One number per output, `[out]`; used as float32.
        bias: `[out]`, added in float32; None for none.
        dtype: The result's dtype, as for `integer_conv2d`.
        largest_code: No code is larger.
        largest_level: No level's magnitude is larger.

    Returns:
        `[..., out]`.

    Raises:
        ValueError: If an argument has a wrong shape, dtype or value.
    """
    _check(codes, levels, scale, bias, dtype, largest_code, largest_level)
    fits = levels.dim() == 2 and codes.dim() > 0 and codes.shape[-1] == levels.shape[1]
    check(fits, "levels", tuple(levels.shape), f"is [out, in] for codes {tuple(codes.shape)}")
    backend = exact_backend(codes.device, largest_code, largest_level, levels.shape[1])
    numbers = scale.detach().float(), None if bias is None else bias.detach().float()
    y: Tensor = linear_operator(codes, levels, *numbers, dtype, backend)
    return y


def integer_obstacle(size: IntegerRange, device: torch.device) -> str | None:
    """Returns why a layer on that device cannot compute with integers by a fast kernel, or None.

    Args:
        size: The largest code, the largest level's magnitude, the number of products in a sum.
        device: Where the layer runs.
    """
    backend = select(OP, device)
    if backend == "reference":
        return f"there is no integer arithmetic on this {device.type} device"
    reason: str | None = load(OP, device, backend).obstacle(size)
    return reason


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _check(
    codes: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    largest_code: int,
    largest_level: int,
) -> None:
    check(codes.dtype == torch.uint8, "codes", codes.dtype, "is torch.uint8")
    check(levels.dtype == torch.int8, "levels", levels.dtype, "is torch.int8")
    check(dtype in _DTYPES, "dtype", dtype, f"are {', '.join(map(str, _DTYPES))}")
    channels = (levels.shape[0],) if levels.dim() else ()
    for name, value in {"scale": scale, "bias": bias}.items():
        if value is not None:
            check(tuple(value.shape) == channels, name, tuple(value.shape), f"is {channels}")
    check_integer("largest_code", largest_code, 1, LARGEST_CODE)
    check_integer("largest_level", largest_level, 1, LARGEST_LEVEL)


@constant_in_graphs
def exact_backend(device: torch.device, largest_code: int, largest_level: int, terms: int) -> Backend:
    """Returns the backend that adds up exactly on that device; a compiled graph keeps it."""
    backend, size = select(OP, device), IntegerRange(largest_code, largest_level, terms)
    return "reference" if load(OP, device, backend).obstacle(size) else backend


def prepare(levels: Tensor, scale: Tensor, geometry: IntegerGeometry | None, backend: str) -> Prepared:
    """Returns the weight as the backend wants it; without a geometry, a linear layer's."""
    kernels = load(OP, levels.device, backend)
    if geometry is None:
        prepared: Prepared = kernels.prepare_linear(levels, scale)
    else:
        prepared = kernels.prepare_conv2d(levels, scale, geometry[:3], geometry.groups)
    return prepared


def run_conv2d(
    codes: Tensor,
    weight: Prepared,
    bias: Tensor | None,
    geometry: IntegerGeometry,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Returns the convolution's result in `dtype` and in the memory format of the codes."""
    form = memory_format(codes)
    ordered, written = codes.contiguous(memory_format=form), dtype if bias is None else torch.float32
    kernels = load(OP, codes.device, backend)
    sums = kernels.conv2d(ordered, weight, geometry[:3], geometry.groups, written)
    if bias is not None:
        sums = sums.add_(bias[:, None, None])
    y: Tensor = sums.to(dtype=dtype, memory_format=form)
    return y


def run_linear(
    codes: Tensor, weight: Prepared, bias: Tensor | None, dtype: torch.dtype, backend: str
) -> Tensor:
    """Returns the linear layer's result in `dtype`."""
    rows = codes.reshape(-1, codes.shape[-1]).contiguous()
    sums = load(OP, codes.device, backend).linear(rows, weight, dtype if bias is None else torch.float32)
    if bias is not None:
        sums = sums.add_(bias)
    y: Tensor = sums.to(dtype)
    return y.reshape(*codes.shape[:-1], y.shape[-1])


def memory_format(codes: Tensor) -> torch.memory_format:
    """Returns the memory format of a map; of one that has both, or neither, `contiguous_format`."""
    last = not codes.is_contiguous() and codes.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def out_size(size: Sequence[int], kernel: Sequence[int], geometry: IntegerGeometry) -> list[int]:
    """Returns height and width of a convolution's result."""
    rows = zip(size, kernel, *geometry[:3], strict=True)
    return [(length + 2 * p - d * (k - 1) - 1) // s + 1 for length, k, s, p, d in rows]


@torch.library.custom_op("lightning_n2uq::integer_conv2d", mutates_args=())
def _integer_conv2d(
    codes: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    geometry = IntegerGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    if codes.numel() == 0:
        return _empty_map(codes, levels, scale, bias, *geometry, dtype, backend).zero_()
    weight = prepare(levels, scale, geometry, backend)
    return run_conv2d(codes, weight, bias, geometry, dtype, backend)


@_integer_conv2d.register_fake
def _empty_map(
    codes: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    geometry = IntegerGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    size = codes.shape[0], levels.shape[0], *out_size(codes.shape[2:], levels.shape[2:], geometry)
    return torch.empty(size, dtype=dtype, device=codes.device, memory_format=memory_format(codes))


@torch.library.custom_op("lightning_n2uq::integer_linear", mutates_args=())
def _integer_linear(
    codes: Tensor, levels: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, backend: str
) -> Tensor:
    if codes.numel() == 0:
        return codes.new_zeros(*codes.shape[:-1], levels.shape[0], dtype=dtype)
    return run_linear(codes, prepare(levels, scale, None, backend), bias, dtype, backend)


@_integer_linear.register_fake
def _(
    codes: Tensor, levels: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, backend: str
) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], levels.shape[0], dtype=dtype)


conv2d_operator, linear_operator = undispatched(_integer_conv2d), undispatched(_integer_linear)
