"""Residual blocks of the paper's networks (N2UQ, CVPR 2022): bias, PReLU, bias, quantizer, convolution."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from lightning_n2uq.layers import BiasedPReLU, QuantConv2d, QuantSpec
from lightning_n2uq.layers.fused import norm_act_conv, norm_add_act
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


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; `[N, C_in, H, W]` to `[N, planes, H / stride, W / stride]`."""

    expansion: ClassVar[int] = 1

    def __init__(
        self, spec: QuantSpec, inputs: int, planes: int, stride: int, downsample: nn.Module | None
    ) -> None:
        super().__init__()
        self.act1 = BiasedPReLU(inputs)
        self.conv1 = quant_conv(spec, inputs, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.act2 = BiasedPReLU(planes)
        self.conv2 = quant_conv(spec, planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample
        self.act_out = BiasedPReLU(planes)

    def forward(self, x: Tensor) -> Tensor:
        """Runs the block."""
        out = norm_act_conv(x, None, self.act1, self.conv1)
        out = norm_act_conv(out, self.bn1, self.act2, self.conv2)
        return norm_add_act(out, self.bn2, *shortcut_branch(x, self.downsample), self.act_out)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which strides), 1x1; `[N, C_in, H, W]` to `[N, 4 planes, H / stride, W / stride]`."""

    expansion: ClassVar[int] = 4

    def __init__(
        self, spec: QuantSpec, inputs: int, planes: int, stride: int, downsample: nn.Module | None
    ) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.act1 = BiasedPReLU(inputs)
        self.conv1 = quant_conv(spec, inputs, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.act2 = BiasedPReLU(planes)
        self.conv2 = quant_conv(spec, planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.act3 = BiasedPReLU(planes)
        self.conv3 = quant_conv(spec, planes, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = downsample
        self.act_out = BiasedPReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Runs the block."""
        out = norm_act_conv(x, None, self.act1, self.conv1)
        out = norm_act_conv(out, self.bn1, self.act2, self.conv2)
        out = norm_act_conv(out, self.bn2, self.act3, self.conv3)
        return norm_add_act(out, self.bn3, *shortcut_branch(x, self.downsample), self.act_out)
