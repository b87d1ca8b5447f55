"""The maths: differentiable operators, the plain-torch oracle that judges them, and their kernels."""

from lightning_n2uq.ops.threshold import threshold_codes, threshold_quantize
from lightning_n2uq.ops.weight import quantize_weight

__all__ = ["quantize_weight", "threshold_codes", "threshold_quantize"]
