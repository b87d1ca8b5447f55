"""MobileNetV2 of the N2UQ paper: quantized inverted residuals with linear outputs.

Sandler et al., CVPR 2018, arXiv 1801.04381; quantized blocks: N2UQ, CVPR 2022, arXiv 2111.14826. Unlike the
float network, the first bottleneck keeps a 1x1 expansion (32 to 32 channels). Stem and last linear layer stay
in full precision unless `first_last_bits` is set, the last 1x1 convolution is quantized behind PACT.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_n2uq.backbones.integer import (
    check_residual,
    first_conv,
    grid_bits,
    last_linear,
    run_layer,
    unsigned_grid,
)
from lightning_n2uq.layers import BiasedPReLU, QuantConv2d, QuantSpec, exact, fused
from lightning_n2uq.quantizers import UniformGrid

STEM_CHANNELS = 32
LAST_CHANNELS = 1280
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks, stride of the first block (MobileNetV2, table 2)."""


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise (which strides), 1x1 projection, all quantized; no activation at the end.

    Maps `[N, inputs, H, W]` to `[N, outputs, H / stride, W / stride]`; adds its input where the shape stays.
    With `residual_bits` the output lies on a learned grid, and so do both summands of a sum.
    """

    def __init__(
        self,
        spec: QuantSpec,
        inputs: int,
        outputs: int,
        expansion: int,
        stride: int,
        residual_bits: int | None = None,
    ) -> None:
        super().__init__()
        hidden = inputs * expansion
        monotone = residual_bits is not None
        self.act1 = BiasedPReLU(inputs, monotone)
        self.conv1 = QuantConv2d(inputs, hidden, 1, bias=False, spec=spec)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.act2 = BiasedPReLU(hidden, monotone)
        self.conv2 = QuantConv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False, spec=spec)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.act3 = BiasedPReLU(hidden, monotone)
        self.conv3 = QuantConv2d(hidden, outputs, 1, bias=False, spec=spec)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.residual = stride == 1 and inputs == outputs
        self.grid = None if residual_bits is None else UniformGrid(residual_bits)

    def forward(self, x: Tensor) -> Tensor:
        """Runs the block."""
        path = fused if self.grid is None or self.training else exact
        out = path.norm_act_conv(x, None, self.act1, self.conv1)
        out = path.norm_act_conv(out, self.bn1, self.act2, self.conv2)
        out = path.norm_act_conv(out, self.bn2, self.act3, self.conv3)
        out = exact.normed(self.bn3, out)
        if self.grid is not None:
            return self.grid.add(out, x) if self.residual else self.grid(out)  # type: ignore[no-any-return]
        return torch.add(out, x) if self.residual else out


class ConvNormReLU6(nn.Sequential):
    """A convolution, its norm, ReLU6 and, with `residual_bits`, the grid of the output."""

    def __init__(self, conv: nn.Conv2d, residual_bits: int | None = None) -> None:
        parts = {"conv1": conv, "bn1": nn.BatchNorm2d(conv.out_channels), "act_out": nn.ReLU6(inplace=True)}
        grid = unsigned_grid(residual_bits)
        super().__init__(OrderedDict(parts if grid is None else {**parts, "out_grid": grid}))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, C_in, H, W]` to `[N, C_out, H', W']`."""
        if not hasattr(self, "out_grid"):
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]
        x = exact.normed(self.bn1, run_layer(self.conv1, x))  # type: ignore[arg-type]
        return self.out_grid(self.act_out(x))  # type: ignore[no-any-return, operator]


class MobileNetV2(nn.Module):
    """Stem, 17 inverted residuals, 1x1 convolution, average pooling, linear layer.

    `[N, C, H, W]` to `[N, num_classes]`; images from 32x32 up. Convolutions start by Kaiming's rule.

    Args:
        spec: Methods and bits of the inverted residuals.
        last_spec: Methods and bits of the last 1x1 convolution.
        num_classes: Number of outputs.
        in_channels: Number of channels of the image.
        residual_bits: As in `ResNet`.
        first_last_bits: As in `ResNet`; the last layer is the linear one.
    """

    def __init__(
        self,
        spec: QuantSpec,
        last_spec: QuantSpec,
        num_classes: int,
        in_channels: int,
        residual_bits: int | None = None,
        first_last_bits: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"num_classes": num_classes, "in_channels": in_channels}.items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, allowed is 1 or more")
        residual_bits = check_residual(residual_bits, spec)
        check_residual(residual_bits, last_spec)
        first_last_bits = grid_bits("first_last_bits", first_last_bits)
        self.on_grids = residual_bits is not None
        stem = first_conv(first_last_bits, in_channels, STEM_CHANNELS, 3, 2)
        features: list[nn.Module] = [ConvNormReLU6(stem, residual_bits)]
        inputs = STEM_CHANNELS
        for expansion, outputs, count, first_stride in STAGES:
            for i in range(count):
                stride = first_stride if i == 0 else 1
                features.append(InvertedResidual(spec, inputs, outputs, expansion, stride, residual_bits))
                inputs = outputs
        last = QuantConv2d(inputs, LAST_CHANNELS, 1, bias=False, spec=last_spec)
        features.append(ConvNormReLU6(last, residual_bits))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = last_linear(first_last_bits, LAST_CHANNELS, num_classes)
        self.in_channels = in_channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `[N, num_classes]` of images `[N, C, H, W]`."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x: got shape {tuple(x.shape)}, allowed is [N, {self.in_channels}, H, W]")
        features = torch.flatten(self.avgpool(self.features(x)), 1)
        if self.on_grids:
            return run_layer(self.fc, features).to(x.dtype)
        return self.fc(features)  # type: ignore[no-any-return]


def mobilenet_v2(
    weight_bits: int = 4,
    activation_bits: int = 4,
    weight_quantizer: str = "n2uq",
    activation_quantizer: str = "n2uq",
    quantize_downsample: bool = True,
    num_classes: int = 1000,
    in_channels: int = 3,
    last_activation_quantizer: str | None = None,
    residual_bits: int | None = None,
    first_last_bits: int | None = None,
) -> MobileNetV2:
    """MobileNetV2 of the paper; most arguments are those of `resnet20`.

    Args:
        weight_bits: 2 to 8; 1 with `binary`, 32 with `float`.
        activation_bits: 2 to 8; 32 with `float`.
        weight_quantizer: A key of `WEIGHT_QUANTIZERS`.
        activation_quantizer: A key of `ACTIVATION_QUANTIZERS`.
        quantize_downsample: Has no effect, since the shortcuts have no convolution.
        num_classes: Number of outputs.
        in_channels: Number of channels of the image.
        last_activation_quantizer: The quantizer in front of the last 1x1 convolution; by default `pact`, as
            in the paper, where the others are N2UQ's, else `activation_quantizer`.
        residual_bits: As in `resnet20`.
        first_last_bits: As in `resnet20`.
    """
    spec = QuantSpec(weight_bits, activation_bits, weight_quantizer, activation_quantizer)
    if last_activation_quantizer is None:
        last_activation_quantizer = (
            "pact" if activation_quantizer.startswith("n2uq") else activation_quantizer
        )
    last_spec = replace(spec, activation_quantizer=last_activation_quantizer)
    return MobileNetV2(spec, last_spec, num_classes, in_channels, residual_bits, first_last_bits)
