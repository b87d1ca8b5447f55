"""Quantized layers, and the fused path on which they train."""

from lightning_n2uq.layers.prelu import BiasedPReLU
from lightning_n2uq.layers.quant import GridSpec, QuantConv2d, QuantLinear, QuantSpec

__all__ = ["BiasedPReLU", "GridSpec", "QuantConv2d", "QuantLinear", "QuantSpec"]
