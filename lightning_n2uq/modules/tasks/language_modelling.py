"""Causal language modelling: the next token from those before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.text import Perplexity

from lightning_n2uq.modules.tasks.base import TaskModule
from lightning_n2uq.modules.tasks.hugging_face import build_transformer

IGNORED = -100
"""The target of places that count nowhere."""


class CausalLanguageModel(TaskModule):
    """Trains a transformer on mappings with `input_ids [B, L]`, where padded with `attention_mask [B, L]`.

    Every token is predicted from those before it. Logged beside the losses: `perplexity`.

    Args:
        model_type: The family of transformers to build with random weights (`gpt2`, `llama`, ...).
        config: Entries of the family's config, such as `vocab_size`.
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
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        optimizer: Literal["adam", "adamw", "sgd"] = "adamw",
        lr: float = 5e-4,
        weight_decay: float = 0.01,
        schedule: Literal["linear", "cosine", "constant"] = "cosine",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(optimizer, lr, weight_decay, schedule, warmup_steps)
        self.save_hyperparameters()
        self.net = build_transformer("AutoModelForCausalLM", model_type, config or {}, pretrained)
        self.example_input_array = {"input_ids": torch.ones(2, 8, dtype=torch.int64)}
        self.keep_metrics()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Returns logits `[B, L, V]` of the tokens that follow; the mask is 0 at padding."""
        found = self.net(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        logits: Tensor = found.logits
        return logits

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the mean cross-entropy per token."""
        return _loss(*self._shifted(batch))

    def evaluate(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss, logits and the tokens that follow."""
        logits, targets = self._shifted(batch)
        return _loss(logits, targets), logits, targets

    def build_metrics(self) -> MetricCollection:
        """Returns `perplexity`."""
        return MetricCollection({"perplexity": Perplexity(ignore_index=IGNORED)})

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Returns the number of tokens to predict."""
        ids = batch["input_ids"]
        return ids[:, 1:].numel()

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the most likely next token after every place, `[B, L]`."""
        logits: Tensor = self(batch["input_ids"], batch.get("attention_mask"))
        return logits.argmax(-1)

    def _shifted(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns logits `[B, L - 1, V]` and their targets, `IGNORED` at padding."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        targets = ids if mask is None else ids.masked_fill(mask == 0, IGNORED)
        return self(ids, mask)[:, :-1], targets[:, 1:]


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
