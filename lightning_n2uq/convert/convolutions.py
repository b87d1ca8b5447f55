"""Quantized forms of convolutions besides `Conv2d`, with the state-dict keys of the float layer.

They are made by `quantize_model`; each has a `weight_quantizer` and an `activation_quantizer`. They train and
evaluate in floats on quantized values.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_n2uq.utils.compat import convolve, output_padding


class QuantConv1d(nn.Conv1d):
    """`conv1d(activation_quantizer(x), weight_quantizer(weight))`."""

    weight_quantizer: nn.Module
    activation_quantizer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, C_in, L]` to `[N, C_out, L']`."""
        return convolve(self, self.activation_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantConv3d(nn.Conv3d):
    """`conv3d(activation_quantizer(x), weight_quantizer(weight))`."""

    weight_quantizer: nn.Module
    activation_quantizer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, C_in, D, H, W]` to `[N, C_out, D', H', W']`."""
        return convolve(self, self.activation_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantConvTranspose1d(nn.ConvTranspose1d):
    """`conv_transpose1d(activation_quantizer(x), weight_quantizer(weight))`."""

    weight_quantizer: nn.Module
    activation_quantizer: nn.Module

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Maps `[N, C_in, L]` to `[N, C_out, L']`; `output_size` is as in torch."""
        return _transposed(self, x, output_size)


class QuantConvTranspose2d(nn.ConvTranspose2d):
    """`conv_transpose2d(activation_quantizer(x), weight_quantizer(weight))`."""

    weight_quantizer: nn.Module
    activation_quantizer: nn.Module

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Maps `[N, C_in, H, W]` to `[N, C_out, H', W']`; `output_size` is as in torch."""
        return _transposed(self, x, output_size)


class QuantConvTranspose3d(nn.ConvTranspose3d):
    """`conv_transpose3d(activation_quantizer(x), weight_quantizer(weight))`."""

    weight_quantizer: nn.Module
    activation_quantizer: nn.Module

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Maps `[N, C_in, D, H, W]` to `[N, C_out, D', H', W']`; `output_size` is as in torch."""
        return _transposed(self, x, output_size)


Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_PRODUCTS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _transposed(layer: Transposed, x: Tensor, output_size: list[int] | None) -> Tensor:
    padding = output_padding(layer, x, output_size)
    weight = layer.weight_quantizer(layer.weight)  # type: ignore[operator]
    y: Tensor = _PRODUCTS[len(layer.kernel_size)](
        layer.activation_quantizer(x),  # type: ignore[operator]
        weight,
        layer.bias,
        layer.stride,
        layer.padding,  # type: ignore[arg-type]
        padding,
        layer.groups,
        layer.dilation,
    )
    return y


class QuantConv1D(nn.Module):
    """Hugging Face's `Conv1D` (a linear layer with the weight `[in, out]`), quantized.

    Attributes:
        weight: `[nx, nf]`.
        bias: `[nf]`.
        nf: The number of outputs.
        nx: The number of inputs.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    nf: int
    nx: int
    weight_quantizer: nn.Module
    activation_quantizer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., nx]` to `[..., nf]`."""
        return F.linear(self.activation_quantizer(x), self.weight_quantizer(self.weight).t(), self.bias)


class QuantStandardizedConv2d(nn.Conv2d):
    """A convolution whose weight is standardized per output channel, scaled, and then quantized.

    Brock et al., "Characterizing signal propagation to close the performance gap in unnormalized ResNets",
    ICLR 2021, arXiv 2101.08692, as in timm's `ScaledStdConv2d`; without `gain` it is weight standardization
    (Qiao et al., 2019, arXiv 1903.10520), as in timm's `StdConv2d`. The gradient passes through the quantizer
    and the standardization.

    Attributes:
        gain: The learned factor of every output channel `[C_out, 1, 1, 1]`, or None.
        scale: The fixed factor beside it.
        eps: What is added to the variance.
        same_pad: Whether the input is padded as TensorFlow does, by its size.
    """

    weight_quantizer: nn.Module
    activation_quantizer: nn.Module
    eps: float
    scale: float
    gain: nn.Parameter | None
    same_pad: bool

    @property
    def effective_weight(self) -> Tensor:
        """The weight `[C_out, C_in / groups, kh, kw]` that is quantized."""
        flat = self.weight.reshape(1, self.out_channels, -1)
        factor = None if self.gain is None else (self.gain * self.scale).view(-1)
        standardized = F.batch_norm(flat, None, None, factor, training=True, momentum=0.0, eps=self.eps)
        return standardized.reshape_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, C_in, H, W]` to `[N, C_out, H', W']`."""
        y = self.activation_quantizer(x)
        if self.same_pad:
            y = F.pad(y, self._pads(y))
        return convolve(self, y, self.weight_quantizer(self.effective_weight), self.bias)

    def _pads(self, x: Tensor) -> list[int]:
        """Returns the zeros left, right, above and below that make the output `ceil(size / stride)`."""
        pads: list[int] = []
        geometry = zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], self.dilation[::-1], strict=True
        )
        for size, kernel, stride, dilation in geometry:
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        return pads
