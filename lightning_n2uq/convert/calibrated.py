"""Quantizers fitted to a layer of an arbitrary network: any input range, weights of any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_n2uq.convert.method_ranges import is_signed, set_method_range
from lightning_n2uq.convert.ranged_input import RangedInput
from lightning_n2uq.quantizers import EWGS, DoReFa, LSQPlus, Quantizer
from lightning_n2uq.quantizers.base import write_parameter
from lightning_n2uq.quantizers.positions import level_position


class CalibratedInput(RangedInput):
    """`scale * inner((x - offset) / scale) + offset`: an activation quantizer fitted to its layer's inputs.

    The methods expect inputs from 0 up; inputs of an arbitrary layer (behind a GELU, a layer norm) may be
    negative and of any size. `offset` is learned, with the gradient `1 - inner'`; `scale` is for methods
    without one of their own and is fixed.

    Args:
        inner: The activation quantizer of a method.
    """

    scale: Tensor
    offset: nn.Parameter | None

    def __init__(self, inner: Quantizer) -> None:
        super().__init__(inner)
        self.inner: Quantizer = inner
        own = isinstance(inner, LSQPlus) or is_signed(inner)
        self.offset = None if own else nn.Parameter(torch.zeros(1))
        self.register_buffer("scale", torch.ones(1))

    @property
    def method(self) -> Quantizer:
        """The wrapped quantizer."""
        return self.inner

    def method_input(self, x: Tensor) -> Tensor:
        """Returns `(x - offset) / scale`."""
        return x if self.offset is None else (x - self.offset) / self.scale

    def shift(self, x: Tensor) -> Tensor | None:
        """Returns the offset once the range is known, None for methods that are scaled as well."""
        plain = not isinstance(self.inner, DoReFa) and not any("forward" in vars(m) for m in self.modules())
        return self.offset if plain and self.fits(x) else None

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Makes the levels go from about `low` to about `high` (0-d, `low < high`)."""
        if self.offset is not None:
            write_parameter(self.offset, low)
        if isinstance(self.inner, DoReFa | EWGS):
            self.scale.fill_(high - low)
            low, high = torch.zeros_like(low), torch.ones_like(high)
        set_method_range(self.inner, low, high)
        self._note_fitted()

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes `x` (any shape, floating); same shape and dtype."""
        if not self.fits(x):
            return self.unfitted(x)
        y = self.inner(self.method_input(x))
        if self.offset is not None:
            y = y * self.scale + self.offset
        return y.to(x.dtype)


class RescaledWeight(Quantizer):
    """`scale * inner(weight)` for weight methods whose levels forget the weights' size (DoReFa, APoT).

    Their networks relearn it in the following normalisation; a trained layer without one would break. `scale`
    is fixed at conversion: least squares between the weights and their levels. The gradient is `inner`'s.

    Args:
        inner: The weight quantizer of a method.
        weight: The layer's weights, of any shape.
    """

    scale: Tensor

    def __init__(self, inner: Quantizer, weight: Tensor) -> None:
        super().__init__(inner.bits)
        self.name = inner.name  # type: ignore[misc]  # reports name the method, not the wrapping
        self.inner: Quantizer = inner
        self.num_levels = inner.num_levels
        with torch.no_grad():
            levels = inner(weight.detach().cpu())
            size = levels.square().sum()
            fit = (levels * weight.detach().cpu()).sum() / torch.where(size == 0, torch.ones_like(size), size)
        self.register_buffer("scale", fit.reshape(1))

    def forward(self, weight: Tensor) -> Tensor:
        """Quantizes `weight` `[C, ...]`; same shape and dtype."""
        y: Tensor = self.inner(weight) * self.scale
        return y.to(weight.dtype)

    def codes(self, weight: Tensor) -> Tensor:
        """Returns the level index of every weight, uint8."""
        return self.inner.codes(weight)


@level_position.register
def _(quantizer: RescaledWeight, x: Tensor) -> Tensor:
    return level_position(quantizer.inner, x)
