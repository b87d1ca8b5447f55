"""The maths: differentiable operators, the plain-torch reference that judges them, their backends."""

from lightning_n2uq.ops.threshold import threshold_codes, threshold_quantize
from lightning_n2uq.ops.weight import quantize_weight

__all__ = ["quantize_weight", "threshold_codes", "threshold_quantize"]
