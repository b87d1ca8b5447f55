"""What weight quantizers share whose levels are integers times one number per output channel or per layer."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_n2uq.ops.tables import compute_dtype
from lightning_n2uq.quantizers.base import Quantizer
from lightning_n2uq.quantizers.looks import looking

_INT8 = 127


class IntegerLevels(Quantizer):
    """A weight quantizer with levels `integer * scale`.

    A subclass gives `parts` and `value`; codes, integer training and export follow.

    Attributes:
        odd: Whether the integers are the odd ones `-n .. n`, `n = 2^bits - 1`, and not neighbours.
    """

    odd: ClassVar[bool] = True

    def parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the integers, in the shape of `weight`, and the scale `[C, 1, ..]` or `[1]`; no gradient.

        Args:
            weight: The weight `[C, ...]` in the compute dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} has no parts")

    def value(self, weight: Tensor) -> Tensor:
        """Returns the quantized weight with the method's gradient; `weight` is as in `parts`."""
        raise NotImplementedError(f"{type(self).__name__} has no value")

    def forward(self, weight: Tensor) -> Tensor:
        """Quantizes `weight` `[C, ...]` in float32, or float64 if it has it; same shape and dtype."""
        return self.value(weight.to(compute_dtype(weight.dtype))).to(weight.dtype)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """Returns the level index of every value, `0 .. num_levels - 1`, uint8."""
        integers, _ = self._parts(weight)
        highest = self.num_levels - 1
        codes = (integers + highest) / 2 if self.odd else integers - self.lowest
        return codes.to(torch.uint8)

    @property
    def lowest(self) -> int:
        """The smallest integer."""
        return 1 - self.num_levels if self.odd else -(self.num_levels // 2)

    @property
    def largest_level(self) -> int:
        """The largest magnitude of the integers; 0 where they do not fit 8 bits."""
        return -self.lowest if -self.lowest <= _INT8 else 0

    def weight_grid(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns the integers and the scale of every channel; None where an integer does not fit 8 bits."""
        if not self.largest_level:
            return None
        integers, scale = self.integers(weight)
        return integers.to(torch.int8), scale

    @torch.no_grad()
    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the integers, int16, and the scale `[C]` that they are multiplied by."""
        integers, scale = self._parts(weight)
        return integers.to(torch.int16), scale.reshape(-1).expand(len(weight))

    def _parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        with looking():  # a question about the weight fits nothing to it
            return self.parts(weight.detach().to(compute_dtype(weight.dtype)))


def channel_mean(values: Tensor) -> Tensor:
    """Returns the mean over all but the first dimension, `[C, 1, ..]`."""
    return values.mean(dim=tuple(range(1, values.dim())), keepdim=True)


def nonzero(scale: Tensor) -> Tensor:
    """Returns `scale`, 1 where it is 0, so that a channel of zeros can be divided by it."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
