"""Quantize networks of other libraries by a policy."""

from lightning_n2uq.convert.attention import QuantMultiheadAttention
from lightning_n2uq.convert.calibrated import CalibratedInput, RescaledWeight
from lightning_n2uq.convert.calibration import calibrate
from lightning_n2uq.convert.policy import Layer, Policy, Rule
from lightning_n2uq.convert.quantize import quantize_model
from lightning_n2uq.convert.report import ConversionReport, LayerReport
from lightning_n2uq.convert.zoo import build_converted

__all__ = [
    "CalibratedInput",
    "ConversionReport",
    "Layer",
    "LayerReport",
    "Policy",
    "QuantMultiheadAttention",
    "RescaledWeight",
    "Rule",
    "build_converted",
    "calibrate",
    "quantize_model",
]
