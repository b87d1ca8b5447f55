"""`n2uq predict`: one file with a line per image, whatever the number of ranks."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_n2uq.utils.atomic import replacing
from lightning_n2uq.utils.class_names import trainers_class_names

FILE_NAME = "predictions.csv"
Row = tuple[int, int, list[float]]
"""Index of an image in the split, predicted label, one probability per class."""


class PredictionsFile(BasePredictionWriter):
    """Collects all ranks' predictions and writes them in the order of the images.

    A rank sees every so-many-th image, and some images twice where the ranks do not divide their number; each
    has one line. Images that could not be decoded have none.

    Args:
        folder: Where rank 0 writes `predictions.csv`: index, predicted label and probabilities, and behind
            them the class by name and the file, where the data knows them.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(write_interval="batch")
        self.path = os.path.join(folder, FILE_NAME)
        self._rows: list[Row] = []

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,  # noqa: ANN401  # whatever `predict_step` returns
        batch_indices: Sequence[int] | None,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keeps a batch's predictions with the indices of its images.

        Raises:
            ValueError: `predict_step` returns something else, or nobody knows which images these are.
        """
        if not (isinstance(prediction, Mapping) and {"labels", "probabilities"} <= prediction.keys()):
            raise ValueError(
                f"predict_step: got {type(prediction).__name__}, allowed is a dictionary with 'labels' [B] "
                "and 'probabilities' [B, classes]"
            )
        labels: list[int] = prediction["labels"].tolist()
        probabilities: Tensor = prediction["probabilities"].float()
        indices = _readable(trainer, batch_indices or ())
        if len(indices) != len(labels):
            raise ValueError(f"data: {len(labels)} predictions of a batch of {len(indices)} images")
        self._rows += zip(indices, labels, probabilities.tolist(), strict=True)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the file, on rank 0. A collective call."""
        rows = sorted({row[0]: row for row in _gathered(self._rows, trainer)}.values())
        if not trainer.is_global_zero:
            return
        with replacing(self.path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            classes = len(rows[0][2]) if rows else 0
            more = _told_by_data(trainer)
            writer.writerow(["index", "label", *(f"probability_{c}" for c in range(classes)), *more])
            for index, label, row in rows:
                writer.writerow([index, label, *row, *(tell(index, label) for tell in more.values())])
        print(f"predictions: {self.path}")


def _told_by_data(trainer: Trainer) -> dict[str, Callable[[int, int], str]]:
    """Returns further columns where the data knows them: the predicted class by name, the image's file."""
    columns: dict[str, Callable[[int, int], str]] = {}
    names = trainers_class_names(trainer)
    name_of = getattr(getattr(trainer.predict_dataloaders, "dataset", None), "name", None)
    if names is not None:
        columns["class"] = lambda index, label: str(names[label])
    if callable(name_of):
        columns["file"] = lambda index, label: str(name_of(index))
    return columns


def _readable(trainer: Trainer, indices: Sequence[int]) -> list[int]:
    """Returns the indices without those of images that were left out as broken."""
    broken = getattr(getattr(trainer.predict_dataloaders, "dataset", None), "broken", None)
    return [i for i in indices if not (isinstance(broken, torch.Tensor) and broken[i])]


def _gathered(rows: list[Row], trainer: Trainer) -> list[Row]:
    if trainer.world_size == 1 or not dist.is_initialized():
        return rows
    parts: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    dist.gather_object(rows, parts, dst=0)
    return [row for part in parts or [] for row in part]
