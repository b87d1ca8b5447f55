"""What the tasks share: steps, logging, optimizer and schedule."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_n2uq.modules.example_input import ModuleWithExampleInput
from lightning_n2uq.modules.optimizers import OPTIMIZERS, build_optimizer
from lightning_n2uq.modules.schedules import SCHEDULES, schedule_factor
from lightning_n2uq.modules.sharding import ShardedByStrategy
from lightning_n2uq.quantizers import quantizer_parameters
from lightning_n2uq.utils.validation import check_choice, check_integer, check_number

Stage = Literal["val", "test"]


class TaskModule(ShardedByStrategy, ModuleWithExampleInput):
    """Base of the tasks: a float network `net`, a loss for training, predictions and metrics for the rest.

    Nothing here knows of quantization. Logged: `train/loss`, and under `val/` and `test/` the metrics of
    `build_metrics` and, where `evaluate` has one, `loss`.

    Args:
        optimizer: `adam`, `adamw` or `sgd` (Nesterov momentum 0.9).
        lr: The learning rate at the start.
        weight_decay: The decay of weights with two or more dimensions; quantizers, biases and norms never
            decay.
        schedule: `linear` (to 0 after the last step), `cosine` or `constant`, per optimizer step.
        warmup_steps: Optimizer steps of linear warm-up.

    Raises:
        ValueError: A value is impossible; the message names the argument, the value and what is allowed.
    """

    net: nn.Module
    sharded = "net"

    def __init__(
        self, optimizer: str, lr: float, weight_decay: float, schedule: str, warmup_steps: int
    ) -> None:
        super().__init__()
        self.optimizer = check_choice("optimizer", optimizer, OPTIMIZERS)
        self.lr = check_number("lr", lr, 0.0, above=True)
        self.weight_decay = check_number("weight_decay", weight_decay, 0.0)
        self.schedule = check_choice("schedule", schedule, SCHEDULES)
        self.warmup_steps = check_integer("warmup_steps", warmup_steps, 0)

    @abstractmethod
    def training_loss(self, batch: Any) -> Tensor:  # noqa: ANN401 -- as the task's data has them
        """Returns the loss of a training batch."""

    @abstractmethod
    def evaluate(self, batch: Any) -> tuple[Tensor | None, Any, Any]:  # noqa: ANN401
        """Returns a batch's loss, or None, and the predictions and targets that the metrics take."""

    @abstractmethod
    def build_metrics(self) -> MetricCollection:
        """Returns the metrics of one stage, by the names under which they are logged."""

    def count(self, batch: Any) -> int:  # noqa: ANN401
        """Returns the number of samples in a batch, the weight of its loss in an epoch's mean."""
        return len(batch[0])

    def keep_metrics(self) -> None:
        """Builds the metrics of both stages, for the end of a constructor."""
        made = {stage: self.build_metrics().clone(prefix=f"{stage}/") for stage in ("val", "test")}
        self.metrics = nn.ModuleDict({f"{stage}_scores": metrics for stage, metrics in made.items()})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        """Returns the loss of a batch."""
        loss = self.training_loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=self.count(batch))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Updates the validation metrics."""
        self._score(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Updates the test metrics."""
        self._score(batch, "test")

    def _score(self, batch: Any, stage: Stage) -> None:  # noqa: ANN401
        loss, predictions, targets = self.evaluate(batch)
        scores = cast(MetricCollection, self.metrics[f"{stage}_scores"])
        scores.update(predictions, targets)
        count = self.count(batch)
        if loss is not None:
            self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=count, sync_dist=True)
        self.log_dict(scores, on_step=False, on_epoch=True, prog_bar=True, batch_size=count)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Returns an optimizer over weights and everything else, and a schedule per optimizer step."""
        quantizers = {parameter for _, parameter in quantizer_parameters(self)}
        members: dict[str, list[nn.Parameter]] = {"weights": [], "rest": []}
        for parameter in self.parameters():
            if parameter.requires_grad:
                decays = parameter.ndim > 1 and parameter not in quantizers
                members["weights" if decays else "rest"].append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": found, "name": name, "weight_decay": self.weight_decay if name == "weights" else 0.0}
            for name, found in members.items()
            if found
        ]
        optimizer = build_optimizer(self.optimizer, groups, lr=self.lr, momentum=0.9, betas=(0.9, 0.999))
        # A fast_dev_run has fewer steps than most warm-ups.
        warmup = 0 if getattr(self.trainer, "fast_dev_run", False) else self.warmup_steps
        factor = schedule_factor(self.schedule, self.trainer.estimated_stepping_batches, warmup)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
