"""Sequence classification: a class for every text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_n2uq.modules.tasks.base import TaskModule
from lightning_n2uq.modules.tasks.hugging_face import build_transformer
from lightning_n2uq.utils.validation import check_integer


class SequenceClassifier(TaskModule):
    """Trains a transformer on mappings of `input_ids [B, L]`, `attention_mask [B, L]` and `labels [B]`.

    Logged beside the losses: `acc`.

    Args:
        model_type: The family of transformers to build with random weights (`bert`, `distilbert`, ...).
        num_classes: The number of classes; the command line takes it from the data.
        config: Entries of the family's config, such as `hidden_size`.
        pretrained: Instead of `model_type`, a folder or a name on the Hugging Face Hub to load weights from.
        optimizer: `adam`, `adamw` or `sgd`.
        lr: The learning rate at the start.
        weight_decay: The decay of weights.
        schedule: `linear`, `cosine` or `constant`.
        warmup_steps: Optimizer steps of linear warm-up.

    Raises:
        ValueError: A value is impossible; the message names the argument, the value and what is allowed.
    """

    def __init__(
        self,
        model_type: str | None = None,
        num_classes: int = 2,
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        optimizer: Literal["adam", "adamw", "sgd"] = "adamw",
        lr: float = 5e-4,
        weight_decay: float = 0.01,
        schedule: Literal["linear", "cosine", "constant"] = "linear",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(optimizer, lr, weight_decay, schedule, warmup_steps)
        self.save_hyperparameters()
        self.num_classes = check_integer("num_classes", num_classes, 2)
        entries = {**(config or {}), "num_labels": num_classes}
        self.net = build_transformer("AutoModelForSequenceClassification", model_type, entries, pretrained)
        ids = torch.ones(2, 8, dtype=torch.int64)
        self.example_input_array = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.keep_metrics()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Returns logits `[B, num_classes]` of token numbers `[B, L]`; the mask is 0 at padding."""
        logits: Tensor = self.net(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the cross-entropy."""
        return F.cross_entropy(self._logits(batch), batch["labels"])

    def evaluate(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss, logits and labels."""
        logits = self._logits(batch)
        return F.cross_entropy(logits, batch["labels"]), logits, batch["labels"]

    def build_metrics(self) -> MetricCollection:
        """Returns `acc`."""
        return MetricCollection({"acc": MulticlassAccuracy(self.num_classes, average="micro")})

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Returns the number of texts."""
        return len(batch["input_ids"])

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Returns probabilities `[B, num_classes]`."""
        return self._logits(batch).softmax(-1)

    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = self(batch["input_ids"], batch.get("attention_mask"))
        return logits
