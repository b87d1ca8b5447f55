"""CIFAR-10."""

from typing import ClassVar

from lightning_n2uq.datamodules._data.arrays import Normalization
from lightning_n2uq.datamodules._data.cifar import CIFARDataModule


class CIFAR10DataModule(CIFARDataModule):
    """CIFAR-10; sources and arguments are described at `CIFARDataModule`."""

    classes: ClassVar[int] = 10
    # Over all pixels of the 50,000 official training images, pixels 0..255 divided by 255.
    statistics: ClassVar[Normalization] = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    pickles: ClassVar[str] = "cifar-10-batches-py"
    torchvision_name: ClassVar[str] = "CIFAR10"
