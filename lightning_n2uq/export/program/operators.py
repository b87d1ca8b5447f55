"""The operators of a deployed layer, for `torch.export`: codes by thresholds, and sums of integers.

They are registered with torch when this module is imported, so that a traced network holds them as single
nodes; `onnx_program` translates each into standard ONNX operators.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@torch.library.custom_op("n2uq_deploy::codes", mutates_args=())
def codes(x: Tensor, thresholds: Tensor) -> Tensor:
    """Returns `#{k : x > thresholds_k}`, uint8 in the shape of `x` (float32); NaN passes none.

    Args:
        x: Values.
        thresholds: Non-decreasing float32 `[n]`, `n` at most 255.
    """
    found = torch.searchsorted(thresholds, x.contiguous(), right=False)
    return torch.where(x.isnan(), 0, found).to(torch.uint8)


@codes.register_fake
def _(x: Tensor, thresholds: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8, memory_format=torch.contiguous_format)


@torch.library.custom_op("n2uq_deploy::integer_linear", mutates_args=())
def integer_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Returns exact sums of codes `x` `[..., I]`, uint8, times `weight` `[O, I]`, int8: int32 `[..., O]`."""
    return F.linear(x.double(), weight.double()).to(torch.int32)


@integer_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.int32)


@torch.library.custom_op("n2uq_deploy::integer_matmul", mutates_args=())
def integer_matmul(x: Tensor, y: Tensor) -> Tensor:
    """Returns exact sums of codes `x` `[..., L, E]` times codes `y` `[..., E, S]`, both uint8: int32."""
    return (x.double() @ y.double()).to(torch.int32)


@integer_matmul.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    return x.new_empty((*batch, x.shape[-2], y.shape[-1]), dtype=torch.int32)


@torch.library.custom_op("n2uq_deploy::integer_conv", mutates_args=())
def integer_conv(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """Returns exact sums of a convolution of codes with integers: int32.

    Args:
        x: Codes `[N, I, *spatial]`, uint8; what surrounds an image has code 0.
        weight: `[O, I / groups, *kernel]`, int8; one to three spatial axes.
        stride: Step of the kernel along each axis.
        padding: Codes around the image along each axis, both sides alike.
        dilation: Spacing of the kernel's elements along each axis.
        groups: Number of groups into which channels are split.
    """
    convolve = CONVOLUTIONS[weight.dim()]
    return convolve(x.double(), weight.double(), None, stride, padding, dilation, groups).to(torch.int32)


@integer_conv.register_fake
def _(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    spatial = [
        (size + 2 * pad - gap * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, gap in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    return x.new_empty((x.shape[0], weight.shape[0], *spatial), dtype=torch.int32)
