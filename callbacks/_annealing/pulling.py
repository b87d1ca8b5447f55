"""Weight quantizers whose value is between the weight and its nearest level, while a hook is on them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_n2uq.callbacks._common.even_weights import ends
from lightning_n2uq.ops.proximal import pulled_to_levels
from lightning_n2uq.ops.ste import straight_through
from lightning_n2uq.quantizers.integers import weight_integers


class Pull:
    """A forward hook on a weight quantizer: in training, its value is the proximal map of the weight.

    The gradient is the quantizer's own.

    Attributes:
        inverse_slope: 1 leaves the weights as they are, 0 gives the quantizer's value.
    """

    def __init__(self) -> None:
        self.inverse_slope = 1.0

    def __call__(self, quantizer: nn.Module, args: tuple[Any, ...], quantized: Tensor) -> Tensor | None:
        """Returns the value in place of the quantizer's, None in evaluation."""
        found = weight_integers(quantizer, args[0]) if quantizer.training else None
        if found is None:
            return None
        wide = args[0].detach().to(quantized.dtype).float()
        scale = found.scale.float().reshape(-1, *(1,) * (wide.dim() - 1))
        integers = found.integers.float()
        low, high = ends(quantizer, found.odd)
        level = integers * scale
        beyond = ((integers >= high) & (wide > level)) | ((integers <= low) & (wide < level))
        half_gap = (scale if found.odd else scale / 2).expand_as(wide).masked_fill(beyond, 0.0)
        value = pulled_to_levels(wide, level, half_gap, self.inverse_slope)
        return straight_through(quantized, value.to(quantized.dtype))
