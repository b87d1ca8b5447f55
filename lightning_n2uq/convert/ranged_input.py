"""What quantizers with a range from data share: sampling, fitting, and how they do before that."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_n2uq.convert.method_ranges import method_range
from lightning_n2uq.ops.ste import straight_through
from lightning_n2uq.quantizers import Quantizer
from lightning_n2uq.quantizers.base import DataInitializedQuantizer, one_value_at_least
from lightning_n2uq.quantizers.looks import is_look
from lightning_n2uq.quantizers.positions import level_position
from lightning_n2uq.quantizers.ranges import full_range, quantize_uniformly, sample_values


class RangedInput(DataInitializedQuantizer):
    """A method's quantizer with a range from data: of `calibrate`, or else of the first batch in training.

    Before that, levels are evenly spaced over the range that fits the values at hand; over all values in a
    look, whose results nobody keeps.

    A subclass gives `method`, `method_input`, `forward` and `set_range`; with a range for each part of its
    input, `sample` and `spread` too.

    Args:
        inner: The activation quantizer of a method.

    Attributes:
        parts: The number of ranges.
    """

    parts = 1

    def __init__(self, inner: Quantizer) -> None:
        super().__init__(inner.bits)
        self.name = inner.name  # type: ignore[misc]  # reports name the method, not the wrapping

    @property  # type: ignore[override]  # a schedule may change the width of the method
    def bits(self) -> int:
        """The code width."""
        return self.method.bits

    @bits.setter
    def bits(self, bits: int) -> None: ...

    @property  # type: ignore[override]
    def num_levels(self) -> int:
        """The number of levels."""
        return self.method.num_levels

    @num_levels.setter
    def num_levels(self, number: int) -> None: ...

    def sample(self, x: Tensor) -> Tensor:
        """Returns values of `x` that tell its range `[..., S]`; several are joined along the last axis."""
        return sample_values(x)

    def range_of(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the lower and the upper end of the range that fits a sample, `[...]` each."""
        return method_range(self.method, sample)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Makes the levels go from about `low` to about `high`, which are as `range_of` returns them."""
        raise NotImplementedError

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        """Returns numbers `[...]`, one for each range, in a shape that goes with `x`."""
        return values

    def first_values(self, x: Tensor) -> dict[str, Tensor]:
        """Returns the ends of the range, `low` and `high`, that fits the values `x`."""
        low, high = self.range_of(self.sample(x))
        return {"low": low, "high": high}

    def set_first_values(self, values: dict[str, Tensor]) -> None:
        """Sets the range."""
        self.set_range(values["low"], values["high"])

    def unfitted(self, x: Tensor) -> Tensor:
        """Quantizes `x` before the range is known; same shape and dtype."""
        if torch.compiler.is_exporting():
            kind = type(self).__name__
            raise ValueError(f"{kind}: got no data yet, allowed is a calibrated or trained network")
        y = quantize_uniformly(x.detach(), *self.own_range(x), self.num_levels).to(x.dtype)
        return straight_through(x, y) + self._nothing() if self.training else y

    def own_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the ends of the range of `x` itself, in a shape that goes with it."""
        sample = self.sample(one_value_at_least(x))
        low, high = full_range(sample) if is_look() else self.range_of(sample)
        return self.spread(low, x), self.spread(high, x)

    def _nothing(self) -> Tensor:
        """Returns 0 as a function of all parameters: data-parallel training waits for each of them."""
        return sum((0 * p.sum() for p in self.parameters() if p.requires_grad), torch.zeros(()))

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Returns the level index of every value, uint8, in the shape of `x`."""
        if self.fitted:
            return self.method.codes(self.method_input(x))
        return level_position(self, x).round().to(torch.uint8)


@level_position.register
def _(quantizer: RangedInput, x: Tensor) -> Tensor:
    if quantizer.fitted:
        return level_position(quantizer.method, quantizer.method_input(x))
    low, high = quantizer.own_range(x)
    return (x.clamp(low, high) - low) / (high - low) * (quantizer.num_levels - 1)
