"""LightningModules by task, in floats: `QuantizeModel` quantizes them, as it does any other."""

from lightning_n2uq.modules.tasks.base import TaskModule
from lightning_n2uq.modules.tasks.detection import ObjectDetector
from lightning_n2uq.modules.tasks.language_modelling import CausalLanguageModel
from lightning_n2uq.modules.tasks.segmentation import SemanticSegmenter
from lightning_n2uq.modules.tasks.sequence_classification import SequenceClassifier

__all__ = [
    "CausalLanguageModel",
    "ObjectDetector",
    "SemanticSegmenter",
    "SequenceClassifier",
    "TaskModule",
]
