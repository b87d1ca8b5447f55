"""Semantic segmentation: a class for every pixel."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from lightning_n2uq.modules.tasks.base import TaskModule
from lightning_n2uq.modules.tasks.networks import build_timm_segmenter, build_torchvision
from lightning_n2uq.utils.torchvision_models import TIMM
from lightning_n2uq.utils.validation import check, check_integer, check_number


class SemanticSegmenter(TaskModule):
    """Trains a segmentation network on batches of `(images [B, C, H, W], classes [B, H, W] int64)`.

    Logged beside the losses: `miou`, the mean over classes of intersection over union (of all pixels of an
    epoch together), and `acc`, the share of right pixels.

    Args:
        network: `torchvision/<model>` of its segmentation models, or `timm/<encoder>` with a small head.
        num_classes: The number of classes; the command line takes it from the data.
        in_channels: The channels of an image, 3 with torchvision's networks; also from the data.
        image_size: The height and width of the images, for `example_input_array`; also from the data.
        pretrained: Whether the encoder starts from its library's default weights, cached or downloaded.
        network_args: Further arguments of the network's constructor; `head_width` with timm's.
        ignore_index: The class number of pixels that count nowhere; None for none.
        auxiliary_weight: The weight of the loss of torchvision's auxiliary head (`aux_loss: true`).
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
        network: str = "torchvision/lraspp_mobilenet_v3_large",
        num_classes: int = 21,
        in_channels: int = 3,
        image_size: int = 256,
        pretrained: bool = False,
        network_args: dict[str, Any] | None = None,
        ignore_index: int | None = None,
        auxiliary_weight: float = 0.5,
        optimizer: Literal["adam", "adamw", "sgd"] = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        schedule: Literal["linear", "cosine", "constant"] = "cosine",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(optimizer, lr, weight_decay, schedule, warmup_steps)
        self.save_hyperparameters()
        self.num_classes = check_integer("num_classes", num_classes, 2)
        check_integer("image_size", image_size, 1)
        self.ignore_index = ignore_index
        self.auxiliary_weight = check_number("auxiliary_weight", auxiliary_weight, 0.0)
        self.net = _build(network, num_classes, in_channels, pretrained, network_args or {})
        self.example_input_array = torch.zeros(2, in_channels, image_size, image_size)
        self.keep_metrics()

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits `[B, num_classes, H, W]` of images `[B, in_channels, H, W]`."""
        return self._maps(images)["out"]

    def training_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Returns the cross-entropy over pixels, that of an auxiliary head added."""
        images, classes = batch
        maps = self._maps(images)
        loss = self._cross_entropy(maps["out"], classes)
        if "aux" in maps:
            loss = loss + self.auxiliary_weight * self._cross_entropy(maps["aux"], classes)
        return loss

    def evaluate(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss, the predicted classes `[B, H, W]` and the true ones."""
        images, classes = batch
        logits = self(images)
        return self._cross_entropy(logits, classes), logits.argmax(1), classes

    def build_metrics(self) -> MetricCollection:
        """Returns `miou` and `acc`."""
        count, ignored = self.num_classes, self.ignore_index
        return MetricCollection(
            {
                "miou": MulticlassJaccardIndex(count, ignore_index=ignored),
                "acc": MulticlassAccuracy(count, average="micro", ignore_index=ignored),
            }
        )

    def predict_step(self, batch: Tensor | tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Returns the predicted classes `[B, H, W]`."""
        return self(batch if isinstance(batch, Tensor) else batch[0]).argmax(1)

    def _maps(self, images: Tensor) -> dict[str, Tensor]:
        found = self.net(images)
        return {"out": found} if isinstance(found, Tensor) else dict(found)

    def _cross_entropy(self, logits: Tensor, classes: Tensor) -> Tensor:
        return F.cross_entropy(
            logits, classes, ignore_index=-100 if self.ignore_index is None else self.ignore_index
        )


def _build(
    network: str, num_classes: int, in_channels: int, pretrained: bool, network_args: dict[str, Any]
) -> nn.Module:
    if network.startswith(TIMM):
        return build_timm_segmenter(network, num_classes, in_channels, pretrained, network_args)
    check(in_channels == 3, "in_channels", in_channels, "is 3 with torchvision's networks; timm's take any")
    return build_torchvision(network, "segmentation", num_classes, pretrained, network_args)
