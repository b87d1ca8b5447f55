"""Weight quantizers for weights whose first dimension is not the output channels."""

from __future__ import annotations

from torch import Tensor

from lightning_n2uq.quantizers.base import MAX_BITS, Quantizer


class TurnedWeight(Quantizer):
    """`inner`, on the weight with its output channels first: for transposed convolutions and `[in, out]`.

    A weight `[I, O / groups, ...]` is turned to `[O, I / groups, ...]`, and the quantized one back. Value and
    gradient are those of `inner`.

    Args:
        inner: The weight quantizer of a method.
        groups: The number of groups of channels.
    """

    widths_allowed = (1, MAX_BITS)

    def __init__(self, inner: Quantizer, groups: int = 1) -> None:
        super().__init__(inner.bits)
        self.name = inner.name  # type: ignore[misc]  # reports name the method, not the wrapping
        self.inner: Quantizer = inner
        self.groups = groups
        self.num_levels = inner.num_levels

    def forward(self, weight: Tensor) -> Tensor:
        """Quantizes `weight` `[I, O / groups, ...]`; same shape and dtype."""
        return self._turn(self.inner(self.channels_first(weight)))

    def codes(self, weight: Tensor) -> Tensor:
        """Returns the level index of every weight, uint8, in the shape of `weight`."""
        return self._turn(self.inner.codes(self.channels_first(weight)))

    def channels_first(self, weight: Tensor) -> Tensor:
        """Returns the weight as `[O, I / groups, ...]`."""
        return self._turn(weight)

    def _turn(self, weight: Tensor) -> Tensor:
        """Swaps inputs and outputs within each group, which is its own inverse."""
        groups = weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return groups.flatten(0, 1).contiguous()
