"""LightningModules: the quantized classifier and its losses, and float networks by task."""

from lightning_n2uq.modules.classifier import QuantizedClassifier
from lightning_n2uq.modules.tasks import (
    CausalLanguageModel,
    ObjectDetector,
    SemanticSegmenter,
    SequenceClassifier,
)

__all__ = [
    "CausalLanguageModel",
    "ObjectDetector",
    "QuantizedClassifier",
    "SemanticSegmenter",
    "SequenceClassifier",
]
