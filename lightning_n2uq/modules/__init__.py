"""LightningModules: the quantized classifier and its losses, optimizers and schedules."""

from lightning_n2uq.modules.classifier import QuantizedClassifier

__all__ = ["QuantizedClassifier"]
