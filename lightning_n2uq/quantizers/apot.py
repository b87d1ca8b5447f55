"""APoT: levels that are sums of powers of two, behind a learned clip.

Li, Dong, Wang, "Additive Powers-of-Two Quantization", ICLR 2020, arXiv 1909.13144.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn

from lightning_n2uq.ops.ste import nearest_level, project_ste
from lightning_n2uq.quantizers.base import Quantizer
from lightning_n2uq.utils.validation import check


def apot_magnitudes(bits: int) -> list[float]:
    """Returns the `2^bits` increasing magnitudes, the largest 1 (APoT, Eq. 5, base width `k = 2`).

    `bits // 2` terms of two bits each choose from zero and every so-many-th power of two; an odd bit adds a
    term of one power between their second and third.
    """
    if bits == 1:
        return [0.0, 1.0]
    terms, odd = divmod(bits, 2)
    exponents = [[i, i + terms, i + 2 * terms + odd] for i in range(terms)]
    choices = [[0.0, *(2.0**-e for e in term)] for term in exponents]
    if odd:
        choices.append([0.0, 2.0 ** -(2 * terms)])
    sums = sorted(sum(parts) for parts in product(*choices))
    return [value / sums[-1] for value in sums]


class APoT(Quantizer):
    """`clip * nearest_level(clamp(x / clip, 0, 1))`, the clip learned (APoT, Eq. 6-7).

    Gradient: of `x`, 1 inside the clipping range, 0 outside; of `clip`, 1 (or -1) outside and
    `level - x / clip` inside. A clip below `STEP_FLOOR` counts as `STEP_FLOOR`, with the same gradient.

    Args:
        bits: The code width, 2 to 8.
        clip_init: The first value of the clip, a positive number.
    """

    name = "apot"
    positive = ("clip",)
    lowest = 0.0  # level, before the clip scales it
    levels: Tensor

    def __init__(self, bits: int = 2, clip_init: float = 2.0) -> None:
        super().__init__(bits)
        check(clip_init > 0, "clip_init", clip_init, "is a positive number")
        self._set_levels(apot_magnitudes(bits))
        self.clip = nn.Parameter(torch.tensor([float(clip_init)]))

    def _set_levels(self, levels: list[float]) -> None:
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.num_levels = len(levels)

    def _unit(self, x: Tensor) -> Tensor:
        clip = self.bounded("clip")
        return (x.to(clip.dtype) / clip).clamp(self.lowest, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes `x` (any shape, floating) in float32; same shape and dtype."""
        return (project_ste(self._unit(x), self.levels) * self.bounded("clip")).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """Returns the level index of every value, uint8."""
        return nearest_level(self._unit(x.detach()), self.levels).to(torch.uint8)


class APoTWeight(APoT):
    """APoT for weights: normalised to zero mean and unit variance first, signed levels (APoT, section 2.3).

    One bit is the sign, so that there are `2^b - 1` levels. The gradient also flows through the
    normalisation. A tensor whose weights are all equal normalises to zeros.
    """

    lowest = -1.0

    def __init__(self, bits: int = 2, clip_init: float = 3.0) -> None:
        super().__init__(bits, clip_init)
        magnitudes = apot_magnitudes(bits - 1)
        self._set_levels([-m for m in reversed(magnitudes[1:])] + magnitudes)

    def _unit(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(x.to(self.clip.dtype), correction=0)
        return super()._unit((x - mean) / (std + 1e-5))
