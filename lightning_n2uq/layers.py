"""Convolution and linear layers with a weight quantizer and an activation quantizer in front."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_n2uq.fusion import packable, packed_conv, suits
from lightning_n2uq.quantizers import activation_quantizer, weight_quantizer


@dataclass(frozen=True)
class QuantSpec:
    """What quantizes a layer: method and bits for weights and for activations.

    Attributes:
        weight_bits: 2 to 8; 32 with `float`.
        activation_bits: 2 to 8; 32 with `float`.
        weight_quantizer: a key of `quantizers.WEIGHT_QUANTIZERS`.
        activation_quantizer: a key of `quantizers.ACTIVATION_QUANTIZERS`.
    """

    weight_bits: int = 2
    activation_bits: int = 2
    weight_quantizer: str = "n2uq"
    activation_quantizer: str = "n2uq"

    def build(self) -> tuple[nn.Module, nn.Module]:
        """A new weight quantizer and a new activation quantizer; `ValueError` names a wrong value."""
        return (
            weight_quantizer(self.weight_quantizer, self.weight_bits),
            activation_quantizer(self.activation_quantizer, self.activation_bits),
        )


class QuantConv2d(nn.Conv2d):
    """`conv2d(activation_quantizer(x), weight_quantizer(weight))`; arguments of `torch.nn.Conv2d` and a spec.

    The state-dict keys of the float layer stay (`weight`, `bias`); quantizer parameters are beside them.
    Gradients are those of the quantizers and of the convolution. Where it can (`fusion.packable`), training
    keeps the quantized input as packed codes for the backward pass; values and gradients are the same.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: of the kernel.
        stride: of the kernel.
        padding: zeros around the quantized input.
        dilation: of the kernel.
        groups: of the channels.
        bias: adds a full-precision bias.
        spec: methods and bits.
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
        self.weight_quantizer, self.activation_quantizer = (spec or QuantSpec()).build()

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, C_in, H, W]` to `[N, C_out, H', W']`, dtype of `x` (autocast's under autocast)."""
        if suits(x) and packable(self):
            return packed_conv(x, None, None, self)
        y: Tensor = self.activation_quantizer(x)
        return self._conv_forward(y, self.weight_quantizer(self.weight), self.bias)


class QuantLinear(nn.Linear):
    """`linear(activation_quantizer(x), weight_quantizer(weight))`; arguments of `torch.nn.Linear` and a spec.

    Args:
        in_features: last dimension of the input.
        out_features: last dimension of the output.
        bias: adds a full-precision bias.
        spec: methods and bits.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, spec: QuantSpec | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.weight_quantizer, self.activation_quantizer = (spec or QuantSpec()).build()

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., in_features]` to `[..., out_features]`."""
        return F.linear(self.activation_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class BiasedPReLU(nn.Module):
    """Per-channel bias, PReLU, per-channel bias: what stands before every quantizer of the paper's networks.

    Attributes:
        bias_in: `[C]`, starts at 0.
        slope: `[C]`, PReLU's, starts at 0.25.
        bias_out: `[C]`, starts at 0.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias_in = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))
        self.bias_out = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, C, H, W]` to the same shape."""
        x = F.prelu(x + self.bias_in.view(-1, 1, 1), self.slope)
        return x + self.bias_out.view(-1, 1, 1)

    def extra_repr(self) -> str:
        """Shows the channels in `print(model)`."""
        return str(self.slope.numel())
