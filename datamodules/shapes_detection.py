"""Made-up scenes for object detection: a box and a class for every object."""

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from lightning_n2uq.datamodules._data.loading import Split
from lightning_n2uq.datamodules._data.shape_scenes import ShapeScenesDataModule
from lightning_n2uq.datamodules._data.shapes import Scenes


class ShapesDetectionDataModule(ShapeScenesDataModule):
    """Discs, squares and crosses on noise, for `ObjectDetector`; nothing is downloaded.

    A batch is `(images, targets)`, lists with one entry per image: `[3, S, S]` float32 from 0 to 1, and
    `boxes [n, 4]` (left, top, right, bottom in pixels) with `labels [n]`, from 1.
    """

    def load_split(self, split: Split) -> "DetectionScenes":
        """Returns images and targets."""
        return DetectionScenes(self.scenes(split))


class DetectionScenes(Dataset[Any]):
    """Scenes as torchvision's detectors take them.

    Args:
        scenes: Images, boxes and labels.
    """

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes.images)

    def __getitems__(self, sample_ids: list[int]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Returns a batch."""
        scenes, chosen = self.scenes, [number % len(self) for number in sample_ids]
        targets = [{"boxes": scenes.boxes[i], "labels": scenes.labels[i]} for i in chosen]
        return [scenes.images[i] for i in chosen], targets

    def __getitem__(self, sample_id: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns one image and its target."""
        images, targets = self.__getitems__([sample_id])
        return images[0], targets[0]
