"""Made-up scenes for semantic segmentation: a class for every pixel."""

from lightning_n2uq.datamodules._data.loading import Split
from lightning_n2uq.datamodules._data.shape_scenes import ShapeScenesDataModule
from lightning_n2uq.datamodules._data.tensors import TensorRows


class ShapesSegmentationDataModule(ShapeScenesDataModule):
    """Discs, squares and crosses on noise, for `SemanticSegmenter`; nothing is downloaded.

    A batch is `(images [B, 3, S, S] float32, classes [B, S, S] int64)`; class 0 is the background. Arguments
    are those of `ShapeScenesDataModule`.
    """

    def load_split(self, split: Split) -> TensorRows:
        """Returns images and class maps."""
        scenes = self.scenes(split)
        return TensorRows((scenes.images - 0.5) * 4, scenes.classes)
