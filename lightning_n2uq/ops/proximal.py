"""The proximal map of PARQ: weights pulled towards the levels of a quantizer.

Jin et al., "PARQ: Piecewise-Affine Regularized Quantization", ICML 2025, arXiv 2503.15748.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pulled_to_levels(weight: Tensor, level: Tensor, half_gap: Tensor, inverse_slope: float) -> Tensor:
    """Returns `c + (w - c) / inverse_slope`, clamped to the levels around `w`, whose middle is `c`.

    With the inverse slope 1 that is the weight itself, with 0 its nearest level; in between, weights near a
    level are on it, and those near a middle move away from it.

    Args:
        weight: The weights `w`.
        level: The level nearest to each weight.
        half_gap: Half the distance to the next level on the weight's side, 0 where there is none.
        inverse_slope: From 1 down to 0.
    """
    if inverse_slope == 0:
        return level
    distance = weight - level
    left = half_gap - (half_gap - distance.abs()) / inverse_slope
    return level + distance.sign() * torch.minimum(left.clamp_min(0), half_gap)
