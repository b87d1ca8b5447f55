from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_n2uq.backbones.blocks import BasicBlock, Bottleneck
from lightning_n2uq.backbones.resnet import ResNet
from lightning_n2uq.layers import BiasedPReLU, QuantSpec
from lightning_n2uq.quantizers import LearnableThresholdQuantizer


def perturbed(model: nn.Module, negative_slopes: bool = False) -> nn.Module:
    """Numbers as training leaves them: norms of both signs, biases, uneven thresholds, some at the floor."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            with torch.no_grad():
                module.weight[::3] *= -1
        if isinstance(module, BiasedPReLU):
            nn.init.normal_(module.bias_in, 0, 0.1)
            nn.init.normal_(module.bias_out, 0, 0.1)
            nn.init.uniform_(module.slope, -0.1 if negative_slopes else 0.0, 0.5)
        if isinstance(module, LearnableThresholdQuantizer):
            nn.init.normal_(module.start, 0, 0.1)
            nn.init.uniform_(module.widths, 0.2 / module.bits**2, 2.0 / module.num_levels)
            nn.init.uniform_(module.scale_in, 0.8, 1.2)
            nn.init.uniform_(module.scale_out, 0.8, 1.2)
            with torch.no_grad():
                module.widths[0] = 1e-4
    return model.eval()


@pytest.fixture
def perturb() -> Callable[..., nn.Module]:
    """`perturbed`, for networks that a test builds itself."""
    return perturbed


@pytest.fixture
def small_network() -> Callable[..., nn.Module]:
    """A residual network of two blocks, one of which changes its shape."""

    def build(
        weight_bits: int = 2,
        activation_bits: int = 2,
        weight_quantizer: str = "n2uq",
        activation_quantizer: str = "n2uq",
        quantize_downsample: bool = True,
        imagenet_stem: bool = False,
        negative_slopes: bool = False,
        in_channels: int = 2,
        width: int = 4,
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
    ) -> nn.Module:
        spec = QuantSpec(weight_bits, activation_bits, weight_quantizer, activation_quantizer)
        model = ResNet(spec, block, (1, 1), width, 5, in_channels, quantize_downsample, imagenet_stem)
        if weight_quantizer != "n2uq" or activation_quantizer != "n2uq":
            model.train()(torch.randn(8, in_channels, 16, 16))
        return perturbed(model, negative_slopes)

    return build
