"""Convolution and linear layers with a weight quantizer and an activation quantizer in front."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_n2uq.layers import exact
from lightning_n2uq.layers.fused import FusibleConv2d
from lightning_n2uq.quantizers import UniformGrid, activation_quantizer, weight_quantizer


@dataclass(frozen=True)
class QuantSpec:
    """What quantizes a layer: method and bits for weights and for activations.

    Attributes:
        weight_bits: 2 to 8; 1 with `binary`, 2 with ternary methods, 32 with `float`.
        activation_bits: 2 to 8; 32 with `float`.
        weight_quantizer: A key of `quantizers.WEIGHT_QUANTIZERS`.
        activation_quantizer: A key of `quantizers.ACTIVATION_QUANTIZERS`.
    """

    weight_bits: int = 2
    activation_bits: int = 2
    weight_quantizer: str = "n2uq"
    activation_quantizer: str = "n2uq"

    def build(self, channels: int | None = None) -> tuple[nn.Module, nn.Module]:
        """Returns a new weight quantizer and a new activation quantizer.

        Args:
            channels: The weight's output channels, for methods that learn a number for each; None stands for
                one number for all.

        Raises:
            ValueError: A value is not allowed; the message names it.
        """
        return (
            weight_quantizer(self.weight_quantizer, self.weight_bits, channels),
            activation_quantizer(self.activation_quantizer, self.activation_bits),
        )


@dataclass(frozen=True)
class GridSpec(QuantSpec):
    """Signed grids with learned ranges for weights and input: both ends of integer-only networks."""

    weight_bits: int = 8
    activation_bits: int = 8

    def build(self, channels: int | None = None) -> tuple[nn.Module, nn.Module]:
        """Returns a new weight quantizer and a new activation quantizer, with one range each."""
        return UniformGrid(self.weight_bits), UniformGrid(self.activation_bits)


def effective_weight(layer: nn.Module) -> Tensor:
    """Returns the weight that a layer quantizes: its own, or one that it computes from it."""
    own = layer.effective_weight if hasattr(layer, "effective_weight") else layer.weight
    weight: Tensor = own  # type: ignore[assignment]
    return weight


class QuantConv2d(FusibleConv2d):
    """`conv2d(activation_quantizer(x), weight_quantizer(weight))`; arguments of `torch.nn.Conv2d` and a spec.

    The state-dict keys of the float layer stay (`weight`, `bias`); quantizer parameters are beside them.
    Gradients are those of the quantizers and of the convolution. Where it can (see `layers.fused`), training
    keeps the quantized input as packed codes for the backward pass; values and gradients are the same.

    Args:
        in_channels: Number of channels of the input.
        out_channels: Number of channels of the output.
        kernel_size: Height and width of the kernel.
        stride: Step of the kernel.
        padding: Zeros around the quantized input, or `same` or `valid`.
        dilation: Spacing between the kernel's elements.
        groups: Number of groups into which the channels are split.
        bias: Whether to add a full-precision bias.
        spec: Methods and bits of the quantizers; `QuantSpec()` by default.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        spec: QuantSpec | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
        )
        self.weight_quantizer, self.activation_quantizer = (spec or QuantSpec()).build(out_channels)


class QuantLinear(nn.Linear):
    """`linear(activation_quantizer(x), weight_quantizer(weight))`; arguments of `torch.nn.Linear` and a spec.

    Args:
        in_features: Size of the input's last dimension.
        out_features: Size of the output's last dimension.
        bias: Whether to add a full-precision bias.
        spec: Methods and bits of the quantizers; `QuantSpec()` by default.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, spec: QuantSpec | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.weight_quantizer, self.activation_quantizer = (spec or QuantSpec()).build(out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., in_features]` to `[..., out_features]`."""
        if exact.takes(self, x):
            return exact.linear(self, x)
        return F.linear(self.activation_quantizer(x), self.weight_quantizer(self.weight), self.bias)
