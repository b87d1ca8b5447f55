"""ResNets of the paper (18, 34, 50; ImageNet stem) and the CIFAR ResNet-20, with its blocks.

First convolution and last linear layer stay in full precision, unless `first_last_bits` is set. He et al.,
CVPR 2016, arXiv 1512.03385; blocks: N2UQ, CVPR 2022, arXiv 2111.14826.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_n2uq.backbones.blocks import BasicBlock, Bottleneck, shortcut
from lightning_n2uq.backbones.integer import (
    check_residual,
    first_conv,
    grid_bits,
    last_linear,
    run_layer,
    unsigned_grid,
)
from lightning_n2uq.layers import QuantSpec
from lightning_n2uq.layers.exact import normed
from lightning_n2uq.layers.fused import norm_act_pool
from lightning_n2uq.quantizers import UniformGrid


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
        residual_bits: Bits of the grids on which maps between blocks lie; None or 0 for real numbers.
        first_last_bits: Bits of weights and inputs of the first and the last layer; None or 0 for full
            precision.

    With `residual_bits` evaluation computes in float64 from the stem on and has no gradient.
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
        residual_bits: int | None = None,
        first_last_bits: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"num_classes": num_classes, "in_channels": in_channels, "width": width}.items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, allowed is 1 or more")
        residual_bits = check_residual(residual_bits, spec, quantize_downsample)
        first_last_bits = grid_bits("first_last_bits", first_last_bits)
        kernel, stride = (7, 2) if imagenet_stem else (3, 1)
        self.conv1 = first_conv(first_last_bits, in_channels, width, kernel, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.stem_grid = unsigned_grid(residual_bits)
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
                stage.append(block(spec, inputs, planes, stride, down, residual_bits))
                inputs = outputs
            self.add_module(name, nn.Sequential(*stage))
        self.out_grid = None if residual_bits is None else UniformGrid(residual_bits)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = last_linear(first_last_bits, inputs, num_classes)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `[N, num_classes]` of images `[N, C, H, W]`."""
        if x.dim() != 4 or x.shape[1] != self.conv1.in_channels:
            raise ValueError(f"x: got shape {tuple(x.shape)}, allowed is [N, {self.conv1.in_channels}, H, W]")
        if self.stem_grid is not None and self.out_grid is not None:
            return self._run_on_grids(x, self.stem_grid, self.out_grid)
        x = self._run_stages(norm_act_pool(self.conv1(x), self.bn1, self.relu, self.maxpool))
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]

    def _run_on_grids(self, images: Tensor, stem_grid: UniformGrid, out_grid: UniformGrid) -> Tensor:
        x = self.relu(normed(self.bn1, run_layer(self.conv1, images)))
        x = self._run_stages(self.maxpool(stem_grid(x)))
        return run_layer(self.fc, torch.flatten(self.avgpool(out_grid(x)), 1)).to(images.dtype)

    def _run_stages(self, x: Tensor) -> Tensor:
        for name in self.stages:
            x = getattr(self, name)(x)
        return x


def resnet20(
    weight_bits: int = 2,
    activation_bits: int = 2,
    weight_quantizer: str = "n2uq",
    activation_quantizer: str = "n2uq",
    quantize_downsample: bool = True,
    num_classes: int = 10,
    in_channels: int = 3,
    width: int = 16,
    residual_bits: int | None = None,
    first_last_bits: int | None = None,
) -> ResNet:
    """CIFAR ResNet-20: three stages of three basic blocks, images from 8x8 up, any channel count.

    Args:
        weight_bits: 2 to 8; 1 with `binary`, 32 with `float`.
        activation_bits: 2 to 8; 32 with `float`.
        weight_quantizer: A key of `WEIGHT_QUANTIZERS`.
        activation_quantizer: A key of `ACTIVATION_QUANTIZERS`.
        quantize_downsample: Whether the shortcuts' 1x1 convolutions are quantized.
        num_classes: Number of outputs.
        in_channels: Number of channels of the image.
        width: Number of channels of the first stage.
        residual_bits: 8 puts the maps between blocks, and both branches of every sum, on learned grids.
        first_last_bits: 8 quantizes weights and input of the first convolution and of the last layer. With
            both options the network computes with integers only (docs/deployment.md).
    """
    spec = QuantSpec(weight_bits, activation_bits, weight_quantizer, activation_quantizer)
    return ResNet(
        spec, BasicBlock, (3, 3, 3), width, num_classes, in_channels, quantize_downsample, False,
        residual_bits, first_last_bits,
    )  # fmt: skip


def resnet18(
    weight_bits: int = 2,
    activation_bits: int = 2,
    weight_quantizer: str = "n2uq",
    activation_quantizer: str = "n2uq",
    quantize_downsample: bool = True,
    num_classes: int = 1000,
    in_channels: int = 3,
    residual_bits: int | None = None,
    first_last_bits: int | None = None,
) -> ResNet:
    """ResNet-18 of the paper: basic blocks 2, 2, 2, 2. Arguments as for `resnet20`."""
    spec = QuantSpec(weight_bits, activation_bits, weight_quantizer, activation_quantizer)
    return ResNet(
        spec, BasicBlock, (2, 2, 2, 2), 64, num_classes, in_channels, quantize_downsample, True,
        residual_bits, first_last_bits,
    )  # fmt: skip


def resnet34(
    weight_bits: int = 2,
    activation_bits: int = 2,
    weight_quantizer: str = "n2uq",
    activation_quantizer: str = "n2uq",
    quantize_downsample: bool = True,
    num_classes: int = 1000,
    in_channels: int = 3,
    residual_bits: int | None = None,
    first_last_bits: int | None = None,
) -> ResNet:
    """ResNet-34 of the paper: basic blocks 3, 4, 6, 3. Arguments as for `resnet20`."""
    spec = QuantSpec(weight_bits, activation_bits, weight_quantizer, activation_quantizer)
    return ResNet(
        spec, BasicBlock, (3, 4, 6, 3), 64, num_classes, in_channels, quantize_downsample, True,
        residual_bits, first_last_bits,
    )  # fmt: skip


def resnet50(
    weight_bits: int = 2,
    activation_bits: int = 2,
    weight_quantizer: str = "n2uq",
    activation_quantizer: str = "n2uq",
    quantize_downsample: bool = True,
    num_classes: int = 1000,
    in_channels: int = 3,
    residual_bits: int | None = None,
    first_last_bits: int | None = None,
) -> ResNet:
    """ResNet-50 of the paper: bottlenecks 3, 4, 6, 3, stride in the 3x3. Arguments as for `resnet20`."""
    spec = QuantSpec(weight_bits, activation_bits, weight_quantizer, activation_quantizer)
    return ResNet(
        spec, Bottleneck, (3, 4, 6, 3), 64, num_classes, in_channels, quantize_downsample, True,
        residual_bits, first_last_bits,
    )  # fmt: skip
