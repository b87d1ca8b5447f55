"""Data modules, one data set per file.

Importing this package reads neither torchvision nor scikit-learn nor Pillow: each is imported where a data
set is first used.
"""

from lightning_n2uq.datamodules._data.base import DataNotFoundError, ImageDataModule
from lightning_n2uq.datamodules.cifar10 import CIFAR10DataModule
from lightning_n2uq.datamodules.cifar100 import CIFAR100DataModule
from lightning_n2uq.datamodules.digits import DigitsDataModule
from lightning_n2uq.datamodules.image_folder import ImageFolderDataModule
from lightning_n2uq.datamodules.imagenet import ImageNetDataModule
from lightning_n2uq.datamodules.python_docs_text import PythonDocsTextDataModule
from lightning_n2uq.datamodules.shapes_detection import ShapesDetectionDataModule
from lightning_n2uq.datamodules.shapes_segmentation import ShapesSegmentationDataModule
from lightning_n2uq.datamodules.synthetic import SyntheticDataModule
from lightning_n2uq.datamodules.synthetic_sequences import SyntheticSequencesDataModule

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DataNotFoundError",
    "DigitsDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageNetDataModule",
    "PythonDocsTextDataModule",
    "ShapesDetectionDataModule",
    "ShapesSegmentationDataModule",
    "SyntheticDataModule",
    "SyntheticSequencesDataModule",
]
