"""The maths: differentiable operators, the plain-torch reference that judges them, their backends."""

from lightning_n2uq.ops.integer import integer_conv2d, integer_linear
from lightning_n2uq.ops.threshold import threshold_codes, threshold_quantize
from lightning_n2uq.ops.weight import quantize_weight

__all__ = ["integer_conv2d", "integer_linear", "quantize_weight", "threshold_codes", "threshold_quantize"]
