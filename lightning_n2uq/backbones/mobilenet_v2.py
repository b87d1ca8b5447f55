"""MobileNetV2 of the N2UQ paper: quantized inverted residuals with linear outputs.

Sandler et al., CVPR 2018, arXiv 1801.04381; quantized blocks: N2UQ, CVPR 2022, arXiv 2111.14826. Unlike the
float network, the first bottleneck keeps a 1x1 expansion (32 to 32 channels). Stem and last linear layer stay
in full precision, the last 1x1 convolution is quantized behind PACT.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_n2uq.layers import BiasedPReLU, QuantConv2d, QuantSpec
from lightning_n2uq.layers.fused import norm_act_conv

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
    """

    def __init__(self, spec: QuantSpec, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.act1 = BiasedPReLU(inputs)
        self.conv1 = QuantConv2d(inputs, hidden, 1, bias=False, spec=spec)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.act2 = BiasedPReLU(hidden)
        self.conv2 = QuantConv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False, spec=spec)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.act3 = BiasedPReLU(hidden)
        self.conv3 = QuantConv2d(hidden, outputs, 1, bias=False, spec=spec)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Runs the block."""
        out = norm_act_conv(x, None, self.act1, self.conv1)
        out = norm_act_conv(out, self.bn1, self.act2, self.conv2)
        out = norm_act_conv(out, self.bn2, self.act3, self.conv3)
        out = self.bn3(out)
        return torch.add(out, x) if self.residual else out


def _conv_bn_relu6(conv: nn.Conv2d) -> nn.Sequential:
    parts = {"conv1": conv, "bn1": nn.BatchNorm2d(conv.out_channels), "act_out": nn.ReLU6(inplace=True)}
    return nn.Sequential(OrderedDict(parts))


class MobileNetV2(nn.Module):
    """Stem, 17 inverted residuals, 1x1 convolution, average pooling, linear layer.

    `[N, C, H, W]` to `[N, num_classes]`; images from 32x32 up. Convolutions start by Kaiming's rule.

    Args:
        spec: Methods and bits of the inverted residuals.
        last_spec: Methods and bits of the last 1x1 convolution.
        num_classes: Number of outputs.
        in_channels: Number of channels of the image.
    """

    def __init__(self, spec: QuantSpec, last_spec: QuantSpec, num_classes: int, in_channels: int) -> None:
        super().__init__()
        for name, value in {"num_classes": num_classes, "in_channels": in_channels}.items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, allowed is 1 or more")
        stem = nn.Conv2d(in_channels, STEM_CHANNELS, 3, 2, padding=1, bias=False)
        features: list[nn.Module] = [_conv_bn_relu6(stem)]
        inputs = STEM_CHANNELS
        for expansion, outputs, count, first_stride in STAGES:
            for i in range(count):
                stride = first_stride if i == 0 else 1
                features.append(InvertedResidual(spec, inputs, outputs, expansion, stride))
                inputs = outputs
        features.append(_conv_bn_relu6(QuantConv2d(inputs, LAST_CHANNELS, 1, bias=False, spec=last_spec)))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(LAST_CHANNELS, num_classes)
        self.in_channels = in_channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `[N, num_classes]` of images `[N, C, H, W]`."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x: got shape {tuple(x.shape)}, allowed is [N, {self.in_channels}, H, W]")
        return self.fc(torch.flatten(self.avgpool(self.features(x)), 1))  # type: ignore[no-any-return]


def mobilenet_v2(
    weight_bits: int = 4,
    activation_bits: int = 4,
    weight_quantizer: str = "n2uq",
    activation_quantizer: str = "n2uq",
    quantize_downsample: bool = True,
    num_classes: int = 1000,
    in_channels: int = 3,
    last_activation_quantizer: str | None = None,
) -> MobileNetV2:
    """MobileNetV2 of the paper; most arguments are those of `resnet20`.

    Args:
        weight_bits: 2 to 8; 32 with `float`.
        activation_bits: 2 to 8; 32 with `float`.
        weight_quantizer: A key of `WEIGHT_QUANTIZERS`.
        activation_quantizer: A key of `ACTIVATION_QUANTIZERS`.
        quantize_downsample: Has no effect, since the shortcuts have no convolution.
        num_classes: Number of outputs.
        in_channels: Number of channels of the image.
        last_activation_quantizer: The quantizer in front of the last 1x1 convolution; by default `pact`, as
            in the paper, where the others are N2UQ's, else `activation_quantizer`.
    """
    spec = QuantSpec(weight_bits, activation_bits, weight_quantizer, activation_quantizer)
    if last_activation_quantizer is None:
        last_activation_quantizer = (
            "pact" if activation_quantizer.startswith("n2uq") else activation_quantizer
        )
    last_spec = replace(spec, activation_quantizer=last_activation_quantizer)
    return MobileNetV2(spec, last_spec, num_classes, in_channels)
