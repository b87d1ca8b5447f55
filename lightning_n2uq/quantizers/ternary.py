"""Ternary weights: minus one, zero and one, times a number per output channel.

Li, Zhang, Liu, "Ternary Weight Networks", 2016, arXiv 1605.04711, section 2 (the threshold 0.7 mean|W|, and
the scale as the mean of the magnitudes above it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_n2uq.ops.ste import straight_through
from lightning_n2uq.quantizers.integer_levels import IntegerLevels, channel_mean, nonzero

_THRESHOLD = 0.7


class TernaryWeight(IntegerLevels):
    """`alpha * sign(W)` where `|W| > 0.7 mean|W|`, else 0; `alpha` is the mean of the former magnitudes.

    Both means are per output channel. Three levels, log2(3) = 1.58 bits of information, in codes of 2 bits.

    Gradient: that of the quantized weight, unchanged; none flows through threshold and `alpha`.

    Args:
        bits: The code width, 2.
    """

    name = "ternary"
    widths_allowed = (2, 2)
    odd = False

    def __init__(self, bits: int = 2) -> None:
        super().__init__(bits)
        self.num_levels = 3

    def limits(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the threshold and `alpha`, both `[C, 1, ..]`; the gradient of `alpha` is kept."""
        sizes = weight.abs()
        threshold = _THRESHOLD * channel_mean(sizes)
        kept = sizes > threshold
        dims = tuple(range(1, weight.dim()))
        count = kept.sum(dims, keepdim=True).clamp_min(1)
        # NaN and infinity exceed no threshold that they are part of, and have to show up in the scale.
        total = torch.where(kept | ~sizes.isfinite(), sizes, 0).sum(dims, keepdim=True)
        return threshold, total / count

    def parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns -1, 0 and 1, and `alpha`."""
        threshold, alpha = self.limits(weight)
        signs = torch.where(weight.abs() > threshold, weight.sign(), 0)
        return torch.where(weight.isnan(), weight, signs), alpha

    def value(self, weight: Tensor) -> Tensor:
        """Returns the quantized weight; the gradient passes unchanged."""
        integers, scale = self.parts(weight.detach())
        return straight_through(weight, integers * scale)

    def place(self, weight: Tensor) -> Tensor:
        """Returns a number that climbs from 0 to 2 and passes 1/2 and 3/2 at the thresholds."""
        threshold, alpha = self.limits(weight)
        sizes = weight.abs()
        beyond = 0.5 + (sizes - threshold) / (2 * nonzero(alpha - threshold))
        share = torch.where(sizes <= threshold, sizes / (2 * nonzero(threshold)), beyond)
        return 1 + weight.sign() * share.clamp(0, 1)
