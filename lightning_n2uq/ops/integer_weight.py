"""Weights of integer layers, packed once for many calls."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_n2uq.ops.eager import watched
from lightning_n2uq.ops.integer import (
    LARGEST_CODE,
    LARGEST_LEVEL,
    IntegerGeometry,
    conv2d_operator,
    exact_backend,
    linear_operator,
    prepare,
    run_conv2d,
    run_linear,
)


class IntegerWeight:
    """A layer's levels, packed once for the kernels; `conv2d` and `linear` run the layer on codes.

    Values are those of `integer_conv2d` and `integer_linear`. Compilers and tracers see those operators.

    Args:
        levels: `[C_out, C_in / groups, kH, kW]` or `[out, in]`, int8.
        scale: One number per output channel.
        bias: One number per output channel, or None.
        geometry: Of a convolution; None for a linear layer.
        largest_code: No code is larger.
        largest_level: No level's magnitude is larger.
    """

    __slots__ = ("_backend", "_packed", "bias", "geometry", "levels", "scale")

    def __init__(
        self,
        levels: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        geometry: IntegerGeometry | None = None,
        largest_code: int = LARGEST_CODE,
        largest_level: int = LARGEST_LEVEL,
    ) -> None:
        self.levels, self.scale, self.geometry = levels, scale.detach().float(), geometry
        self.bias = None if bias is None else bias.detach().float()
        terms = levels[0].numel()
        self._backend = exact_backend(levels.device, largest_code, largest_level, terms)
        self._packed = prepare(levels, self.scale, geometry, self._backend)

    def conv2d(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Maps codes `[N, C_in, H, W]` to `[N, C_out, H', W']`, as `integer_conv2d`."""
        assert self.geometry is not None
        if watched((codes,)):
            numbers = self.levels, self.scale, self.bias, *self.geometry
            y: Tensor = conv2d_operator(codes, *numbers, dtype, self._backend)
            return y
        return run_conv2d(codes, self._packed, self.bias, self.geometry, dtype, self._backend)

    def linear(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Maps codes `[..., in]` to `[..., out]`, as `integer_linear`."""
        if watched((codes,)):
            y: Tensor = linear_operator(codes, self.levels, self.scale, self.bias, dtype, self._backend)
            return y
        return run_linear(codes, self._packed, self.bias, dtype, self._backend)
