"""Object detection: boxes and their classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.detection import IntersectionOverUnion, MeanAveragePrecision

from lightning_n2uq.modules.tasks.base import TaskModule
from lightning_n2uq.modules.tasks.networks import build_torchvision
from lightning_n2uq.utils.extras import how_to_install
from lightning_n2uq.utils.validation import check, check_choice, check_integer, check_number

Boxes = list[dict[str, Tensor]]
"""Per image: `boxes [n, 4]` (left, top, right, bottom in pixels), `labels [n]`, predictions with `scores`."""


class ObjectDetector(TaskModule):
    """Trains a detector of torchvision on batches of `(images, targets)`, both lists, one entry per image.

    An image is `[3, H, W]` with values from 0 to 1 (the network normalizes and resizes it), a target holds
    `boxes` and `labels`; class 0 is the background. Logged beside the training loss: `map`, the COCO mean
    average precision, or `iou`, the mean overlap of detections with objects of their class.

    Args:
        network: `torchvision/<model>` of its detection models for boxes.
        num_classes: The number of classes with the background; the command line takes it from the data.
        image_size: The height and width of the images, for `example_input_array`; also from the data.
        pretrained: Whether the backbone starts from torchvision's default weights, cached or downloaded.
        network_args: Further arguments of the network's constructor, such as `min_size` and `max_size`.
        metric: `map`, which needs the extra `detection`, or `iou`, which needs nothing.
        score_threshold: Detections with a lower score do not count in `iou`.
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
        network: str = "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn",
        num_classes: int = 91,
        image_size: int = 320,
        pretrained: bool = False,
        network_args: dict[str, Any] | None = None,
        metric: Literal["map", "iou"] = "map",
        score_threshold: float = 0.5,
        optimizer: Literal["adam", "adamw", "sgd"] = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        schedule: Literal["linear", "cosine", "constant"] = "cosine",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(optimizer, lr, weight_decay, schedule, warmup_steps)
        self.save_hyperparameters()
        check_integer("num_classes", num_classes, 2)
        check_integer("image_size", image_size, 1)
        self.metric = check_choice("metric", metric, ("map", "iou"))
        self.score_threshold = check_number("score_threshold", score_threshold, 0.0, 1.0)
        fits = not any(name in network for name in ("maskrcnn", "keypointrcnn"))
        check(fits, "network", network, "is one for boxes: its data has neither masks nor keypoints")
        self.net = build_torchvision(network, "detection", num_classes, pretrained, network_args or {})
        self.example_input_array = ([torch.zeros(3, image_size, image_size)],)
        self.keep_metrics()

    def forward(self, images: list[Tensor]) -> Boxes:
        """Returns the detections in images `[3, H, W]`; in evaluation mode only."""
        found: Boxes = self.net(images)
        return found

    def training_loss(self, batch: tuple[list[Tensor], Boxes]) -> Tensor:
        """Returns the sum of the network's losses.

        In evaluation mode norms and dropout stay in that mode, and the same anchors are drawn every time.
        """
        with self._giving_losses():
            losses: dict[str, Tensor] = self.net(*batch)
        return torch.stack([*losses.values()]).sum()

    @contextmanager
    def _giving_losses(self) -> Iterator[None]:
        """Tells the detector alone, not the layers in it, that it is trained."""
        kind = "torchvision.models.detection"
        asleep = [m for m in self.net.modules() if type(m).__module__.startswith(kind) and not m.training]
        if self.training or not asleep:
            yield
            return
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            for module in asleep:
                module.training = True
            try:
                yield
            finally:
                for module in asleep:
                    module.training = False

    def evaluate(self, batch: tuple[list[Tensor], Boxes]) -> tuple[None, Boxes, Boxes]:
        """Returns detections and targets; the networks have no loss in evaluation mode."""
        images, targets = batch
        found = self(images)
        if self.metric == "iou":
            found = [_above(detections, self.score_threshold) for detections in found]
        return None, found, targets

    def build_metrics(self) -> MetricCollection:
        """Returns `map` or `iou`."""
        metrics: dict[str, Metric | MetricCollection] = {}
        if self.metric == "iou":
            metrics["iou"] = _BoxOverlap()
            return MetricCollection(metrics)
        try:
            metrics["map"] = _AveragePrecision()
        except ModuleNotFoundError as error:
            raise ValueError(
                f"metric: got 'map', which needs pycocotools: {how_to_install('detection')}; "
                "'iou' runs without"
            ) from error
        return MetricCollection(metrics)

    def predict_step(self, batch: tuple[list[Tensor], Boxes], batch_idx: int) -> Boxes:
        """Returns the detections."""
        return self(batch[0])


def _above(found: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
    kept = found["scores"] >= threshold
    return {name: values[kept] for name, values in found.items()}


class _AveragePrecision(MeanAveragePrecision):
    """The mean alone, as a number that can be logged."""

    def compute(self) -> Tensor:  # type: ignore[override]
        return super().compute()["map"]


class _BoxOverlap(IntersectionOverUnion):
    """The mean alone; 0 where nothing was found."""

    def compute(self) -> Tensor:  # type: ignore[override]
        return super().compute()["iou"].nan_to_num(0.0)
