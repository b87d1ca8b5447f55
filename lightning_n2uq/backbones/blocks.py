"""Residual blocks of the paper's networks (N2UQ, CVPR 2022): bias, PReLU, bias, quantizer, convolution.

In an integer-only network (`residual_bits`) both branches of a sum are put on one learned grid first, so that
what is added are integers of the same step. Evaluation is exact then (`layers.exact`).
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from lightning_n2uq.layers import BiasedPReLU, QuantConv2d, QuantSpec, exact, fused
from lightning_n2uq.layers.fused import norm_add_act
from lightning_n2uq.quantizers import UniformGrid
from lightning_n2uq.utils.compat import has_hooks


def quant_conv(spec: QuantSpec, inputs: int, outputs: int, kernel: int, stride: int = 1) -> QuantConv2d:
    """Returns a quantized convolution without bias, padded to keep the size at stride 1."""
    return QuantConv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False, spec=spec)


def shortcut(spec: QuantSpec, inputs: int, outputs: int, stride: int, quantize: bool) -> nn.Module | None:
    """Returns 1x1 convolution and norm where the shape changes, else None; it takes the raw block input."""
    if stride == 1 and inputs == outputs:
        return None
    if quantize:
        conv: nn.Module = quant_conv(spec, inputs, outputs, 1, stride)
    else:
        conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def shortcut_branch(x: Tensor, downsample: nn.Module | None) -> tuple[Tensor, nn.Module | None]:
    """Returns the shortcut up to its norm, and that norm, which the sum behind it can take in."""
    if downsample is None:
        return x, None
    if type(downsample) is nn.Sequential and len(downsample) == 2 and not has_hooks(downsample):
        return downsample[0](x), downsample[1]
    return downsample(x), None


class _ResidualBlock(nn.Module):
    """What both kinds of blocks share: norms and activations in front of convolutions, and the sum.

    Args:
        spec: Methods and bits of the convolutions.
        shapes: Input channels, output channels, kernel size and stride of each convolution.
        downsample: The shortcut's layers; None adds the input itself.
        residual_bits: The bits of the grid of the sum; None adds real numbers.
    """

    def __init__(
        self,
        spec: QuantSpec,
        shapes: tuple[tuple[int, int, int, int], ...],
        downsample: nn.Module | None,
        residual_bits: int | None,
    ) -> None:
        super().__init__()
        monotone = residual_bits is not None
        for i, (inputs, outputs, kernel, stride) in enumerate(shapes, 1):
            self.add_module(f"act{i}", BiasedPReLU(inputs, monotone))
            self.add_module(f"conv{i}", quant_conv(spec, inputs, outputs, kernel, stride))
            self.add_module(f"bn{i}", nn.BatchNorm2d(outputs))
        self.convolutions = len(shapes)
        self.downsample = downsample
        self.act_out = BiasedPReLU(shapes[-1][1], monotone)
        self.grid = None if residual_bits is None else UniformGrid(residual_bits)

    def forward(self, x: Tensor) -> Tensor:
        """Runs the block."""
        path = fused if self.grid is None or self.training else exact
        out, norm = x, cast(Any, None)
        for i in range(1, self.convolutions + 1):
            act, conv = getattr(self, f"act{i}"), getattr(self, f"conv{i}")
            out, norm = path.norm_act_conv(out, norm, act, conv), getattr(self, f"bn{i}")
        if self.grid is None:
            return norm_add_act(out, norm, *shortcut_branch(x, self.downsample), self.act_out)
        branch = x if self.downsample is None else exact.in_order(self.downsample, x)
        total: Tensor = self.act_out(self.grid.add(exact.normed(norm, out), branch))
        return total


class BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions; `[N, C_in, H, W]` to `[N, planes, H / stride, W / stride]`."""

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        spec: QuantSpec,
        inputs: int,
        planes: int,
        stride: int,
        downsample: nn.Module | None,
        residual_bits: int | None = None,
    ) -> None:
        shapes = ((inputs, planes, 3, stride), (planes, planes, 3, 1))
        super().__init__(spec, shapes, downsample, residual_bits)


class Bottleneck(_ResidualBlock):
    """1x1, 3x3 (which strides), 1x1; `[N, C_in, H, W]` to `[N, 4 planes, H / stride, W / stride]`."""

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        spec: QuantSpec,
        inputs: int,
        planes: int,
        stride: int,
        downsample: nn.Module | None,
        residual_bits: int | None = None,
    ) -> None:
        shapes = ((inputs, planes, 1, 1), (planes, planes, 3, stride), (planes, planes * 4, 1, 1))
        super().__init__(spec, shapes, downsample, residual_bits)
