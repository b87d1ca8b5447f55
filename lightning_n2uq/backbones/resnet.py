"""ResNets of the paper (18, 34, 50; ImageNet stem) and the CIFAR ResNet-20, with its blocks.

First convolution and last linear layer stay in full precision. He et al., CVPR 2016, arXiv 1512.03385;
blocks: N2UQ, CVPR 2022, arXiv 2111.14826.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_n2uq.backbones.blocks import BasicBlock, Bottleneck, shortcut
from lightning_n2uq.layers import QuantSpec
from lightning_n2uq.layers.fused import norm_act_pool


class ResNet(nn.Module):
    """Stem, stages of residual blocks, average pooling, linear layer: `[N, C, H, W]` to `[N, num_classes]`.

    Convolutions start by Kaiming's rule. Child names are torchvision's, so that its weights load by name.

    Args:
        spec: Methods and bits of every block.
        block: The class of the blocks, `BasicBlock` or `Bottleneck`.
        blocks: Number of blocks in each stage.
        width: Number of channels of the first stage; each later stage doubles it and halves the size.
        num_classes: Number of outputs.
        in_channels: Number of channels of the image.
        quantize_downsample: Whether the shortcuts' 1x1 convolutions are quantized.
        imagenet_stem: Whether the stem is 7x7 with stride 2 and max pooling, or else 3x3 with stride 1.
    """

    def __init__(
        self,
        spec: QuantSpec,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, ...],
        width: int,
        num_classes: int,
        in_channels: int,
        quantize_downsample: bool,
        imagenet_stem: bool,
    ) -> None:
        super().__init__()
        for name, value in {"num_classes": num_classes, "in_channels": in_channels, "width": width}.items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, allowed is 1 or more")
        kernel, stride = (7, 2) if imagenet_stem else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet_stem else nn.Identity()
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        inputs = width
        for i, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            planes = width * 2**i
            stage = []
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                outputs = planes * block.expansion
                down = shortcut(spec, inputs, outputs, stride, quantize_downsample)
                stage.append(block(spec, inputs, planes, stride, down))
                inputs = outputs
            self.add_module(name, nn.Sequential(*stage))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `[N, num_classes]` of images `[N, C, H, W]`."""
        if x.dim() != 4 or x.shape[1] != self.conv1.in_channels:
            raise ValueError(f"x: got shape {tuple(x.shape)}, allowed is [N, {self.conv1.in_channels}, H, W]")
        x = norm_act_pool(self.conv1(x), self.bn1, self.relu, self.maxpool)
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


def resnet20(
    weight_bits: int = 2,
    activation_bits: int = 2,
    weight_quantizer: str = "n2uq",
    activation_quantizer: str = "n2uq",
    quantize_downsample: bool = True,
    num_classes: int = 10,
    in_channels: int = 3,
    width: int = 16,
) -> ResNet:
    """CIFAR ResNet-20: three stages of three basic blocks, images from 8x8 up, any channel count.

    Args:
        weight_bits: 2 to 8; 32 with `float`.
        activation_bits: 2 to 8; 32 with `float`.
        weight_quantizer: A key of `WEIGHT_QUANTIZERS`.
        activation_quantizer: A key of `ACTIVATION_QUANTIZERS`.
        quantize_downsample: Whether the shortcuts' 1x1 convolutions are quantized.
        num_classes: Number of outputs.
        in_channels: Number of channels of the image.
        width: Number of channels of the first stage.
    """
    spec = QuantSpec(weight_bits, activation_bits, weight_quantizer, activation_quantizer)
    return ResNet(spec, BasicBlock, (3, 3, 3), width, num_classes, in_channels, quantize_downsample, False)


def resnet18(
    weight_bits: int = 2,
    activation_bits: int = 2,
    weight_quantizer: str = "n2uq",
    activation_quantizer: str = "n2uq",
    quantize_downsample: bool = True,
    num_classes: int = 1000,
    in_channels: int = 3,
) -> ResNet:
    """ResNet-18 of the paper: basic blocks 2, 2, 2, 2. Arguments as for `resnet20`."""
    spec = QuantSpec(weight_bits, activation_bits, weight_quantizer, activation_quantizer)
    return ResNet(spec, BasicBlock, (2, 2, 2, 2), 64, num_classes, in_channels, quantize_downsample, True)


def resnet34(
    weight_bits: int = 2,
    activation_bits: int = 2,
    weight_quantizer: str = "n2uq",
    activation_quantizer: str = "n2uq",
    quantize_downsample: bool = True,
    num_classes: int = 1000,
    in_channels: int = 3,
) -> ResNet:
    """ResNet-34 of the paper: basic blocks 3, 4, 6, 3. Arguments as for `resnet20`."""
    spec = QuantSpec(weight_bits, activation_bits, weight_quantizer, activation_quantizer)
    return ResNet(spec, BasicBlock, (3, 4, 6, 3), 64, num_classes, in_channels, quantize_downsample, True)


def resnet50(
    weight_bits: int = 2,
    activation_bits: int = 2,
    weight_quantizer: str = "n2uq",
    activation_quantizer: str = "n2uq",
    quantize_downsample: bool = True,
    num_classes: int = 1000,
    in_channels: int = 3,
) -> ResNet:
    """ResNet-50 of the paper: bottlenecks 3, 4, 6, 3, stride in the 3x3. Arguments as for `resnet20`."""
    spec = QuantSpec(weight_bits, activation_bits, weight_quantizer, activation_quantizer)
    return ResNet(spec, Bottleneck, (3, 4, 6, 3), 64, num_classes, in_channels, quantize_downsample, True)
