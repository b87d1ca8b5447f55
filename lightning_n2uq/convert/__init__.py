"""Quantize networks of other libraries by a policy."""

from lightning_n2uq.convert.allocation import Allocation, allocate_bits
from lightning_n2uq.convert.attention import QuantMultiheadAttention
from lightning_n2uq.convert.calibrated import CalibratedInput, RescaledWeight
from lightning_n2uq.convert.calibration import calibrate
from lightning_n2uq.convert.policy import Layer, Policy, Rule
from lightning_n2uq.convert.quantize import quantize_model
from lightning_n2uq.convert.report import ConversionReport, LayerReport
from lightning_n2uq.convert.scores import LayerScores, Sensitivity
from lightning_n2uq.convert.scoring import sensitivity
from lightning_n2uq.convert.zoo import build_converted

__all__ = [
    "Allocation",
    "CalibratedInput",
    "ConversionReport",
    "Layer",
    "LayerReport",
    "LayerScores",
    "Policy",
    "QuantMultiheadAttention",
    "RescaledWeight",
    "Rule",
    "Sensitivity",
    "allocate_bits",
    "build_converted",
    "calibrate",
    "quantize_model",
    "sensitivity",
]
