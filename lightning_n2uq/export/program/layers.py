"""Quantized layers as they are deployed: codes, integer sums, one multiplication and addition per channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_n2uq.convert.attention import QuantMultiheadAttention
from lightning_n2uq.export.lower.weights import IntegerWeight
from lightning_n2uq.export.program import operators
from lightning_n2uq.export.program.staircases import Staircase
from lightning_n2uq.export.program.traces import seen
from lightning_n2uq.utils.compat import padding_of_sides


class DeployedQuantizer(nn.Module):
    """An activation quantizer as its staircase: codes, or the levels that they stand for."""

    thresholds: Tensor
    levels: Tensor

    def __init__(self, stairs: Staircase, name: str) -> None:
        super().__init__()
        self.name = name
        self.stairs = stairs
        self.register_buffer("thresholds", torch.from_numpy(stairs.thresholds))
        self.register_buffer("levels", torch.from_numpy(stairs.levels))

    def codes(self, x: Tensor) -> Tensor:
        """Returns the codes of `x` (any shape, floating), uint8."""
        x = x.float()
        return seen(self.name, x, operators.codes(x, self.thresholds))

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes `x`; same shape and dtype."""
        codes, stairs = self.codes(x), self.stairs
        if stairs.uniform:
            return (codes.to(torch.float32) * stairs.step + stairs.offset).to(x.dtype)
        return self.levels[codes.to(torch.int64)].to(x.dtype)


class _IntegerLayer(nn.Module):
    """What integer convolutions and linear layers share: `float32(sums) * scale + shift` per channel."""

    weight: Tensor
    scale: Tensor
    shift: Tensor
    ones: Tensor | None

    def __init__(
        self, quantizer: DeployedQuantizer, weight: IntegerWeight, bias: Tensor | None, axes: int, groups: int
    ) -> None:
        super().__init__()
        self.quantizer = quantizer
        integers = torch.from_numpy(weight.integers)
        # The odd levels of 8 bits do not fit a byte: twice a byte, plus one.
        self.doubled = bool(weight.integers.max(initial=0) > 127 or weight.integers.min(initial=0) < -128)
        stored = integers.sub(1).div(2, rounding_mode="floor") if self.doubled else integers
        self.register_buffer("weight", stored.to(torch.int8))
        one = torch.ones(groups, *integers.shape[1:], dtype=torch.int8)
        self.register_buffer("ones", one if self.doubled else None)
        stairs, shape = quantizer.stairs, (-1, *[1] * axes)
        scale = torch.from_numpy(weight.scale) * stairs.step
        self.register_buffer("scale", scale.float().reshape(shape))
        shift = torch.zeros(len(integers)) if bias is None else bias.detach().cpu().double()
        self.register_buffer("shift", shift.float().reshape(shape))

    def _sums(self, codes: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _real(self, codes: Tensor) -> Tensor:
        sums = self._sums(codes, self.weight)
        if self.ones is not None:
            total, times = self._sums(codes, self.ones), len(self.weight) // len(self.ones)
            sums = sums * 2 + (total if len(self.ones) == 1 else total.repeat_interleave(times, 1))
        return sums.to(torch.float32) * self.scale


class DeployedLinear(_IntegerLayer):
    """A quantized linear layer on codes.

    Args:
        quantizer: The quantizer of its input, with even levels.
        weight: Integers `[O, I]` and scales.
        bias: `[O]`, or None.
    """

    def __init__(self, quantizer: DeployedQuantizer, weight: IntegerWeight, bias: Tensor | None) -> None:
        super().__init__(quantizer, weight, bias, 0, 1)
        if quantizer.stairs.offset:
            total = torch.from_numpy(weight.integers).double().sum(1) * torch.from_numpy(weight.scale)
            self.shift += (total * quantizer.stairs.offset).float()

    def _sums(self, codes: Tensor, weight: Tensor) -> Tensor:
        return operators.integer_linear(codes, weight)

    def from_codes(self, codes: Tensor) -> Tensor:
        """Maps codes `[..., I]` to `[..., O]`, float32."""
        return self._real(codes) + self.shift

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., I]` to `[..., O]`, in the dtype of `x`."""
        return self.from_codes(self.quantizer.codes(x)).to(x.dtype)


class DeployedConv(_IntegerLayer):
    """A quantized convolution on codes, over one to three spatial axes.

    Args:
        quantizer: The quantizer of its input, with even levels.
        weight: Integers `[O, I / groups, *kernel]` and scales.
        layer: The convolution: strides, padding, dilation, groups, bias.
    """

    inside: Tensor

    def __init__(
        self, quantizer: DeployedQuantizer, weight: IntegerWeight, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d
    ) -> None:
        super().__init__(quantizer, weight, layer.bias, weight.integers.ndim - 2, layer.groups)
        self.stride, self.dilation, self.groups = list(layer.stride), list(layer.dilation), layer.groups
        # Both sides of every axis, the last axis first, as `torch.nn.functional.pad` takes them.
        self.sides = padding_of_sides(layer)
        self.mode = layer.padding_mode
        inside = torch.from_numpy(weight.integers).double().sum(1, keepdim=True)
        offset = torch.from_numpy(weight.scale).reshape(-1, *[1] * (inside.dim() - 1))
        self.register_buffer("inside", (inside * offset * quantizer.stairs.offset).float())

    def _sums(self, codes: Tensor, weight: Tensor) -> Tensor:
        padding = self._padding(codes)
        return operators.integer_conv(codes, weight, self.stride, padding, self.dilation, self.groups)

    def _padding(self, codes: Tensor) -> list[int]:
        return self.sides[::-2] if self._symmetric else [0] * (codes.dim() - 2)

    @property
    def _symmetric(self) -> bool:
        return self.mode == "zeros" and self.sides[::2] == self.sides[1::2]

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, I, *spatial]`, or one image without `N`, to the layer's output, in the dtype of `x`."""
        single = x.dim() == self.weight.dim() - 1
        codes = self.quantizer.codes(x.unsqueeze(0) if single else x)
        inside = torch.ones_like(codes[:1, :1], dtype=torch.float32)
        if not self._symmetric:
            codes = _pad(codes, self.sides, self.mode)
            inside = _pad(inside, self.sides, self.mode)
        out = self._real(codes) + self.shift
        if self.quantizer.stairs.offset:
            out = out + self._offsets(inside)
        return (out.squeeze(0) if single else out).to(x.dtype)

    def _offsets(self, inside: Tensor) -> Tensor:
        """Returns what the offset of all levels adds: zeros around an image have none."""
        convolve = operators.CONVOLUTIONS[self.weight.dim()]
        ones = inside.expand(1, self.groups, *inside.shape[2:])
        kernel = self.inside
        return convolve(ones, kernel, None, self.stride, self._padding(inside), self.dilation, self.groups)


def _pad(x: Tensor, sides: Sequence[int], mode: str) -> Tensor:
    if mode == "zeros":
        return F.pad(x, list(sides))
    return F.pad(x.float(), list(sides), mode).to(x.dtype)  # torch has no such padding of bytes


class DeployedAttention(QuantMultiheadAttention):
    """Multi-head attention whose projections work on codes; what lies between them stays float."""

    def __init__(self, layer: QuantMultiheadAttention, parts: Sequence[DeployedLinear]) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({k: v for k, v in vars(layer).items() if not k.startswith("_")})
        self.projections = nn.ModuleList(parts)
        self.out_proj = layer.out_proj
        self.add_module("products", layer.products)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        parts = [cast(DeployedLinear, part) for part in self.projections]
        if query is key and key is value:
            codes = parts[0].quantizer.codes(query)
            return [part.from_codes(codes).to(query.dtype) for part in parts]
        return [part(x) for part, x in zip(parts, (query, key, value), strict=True)]
