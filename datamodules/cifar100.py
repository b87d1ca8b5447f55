"""CIFAR-100."""

from typing import ClassVar

from lightning_n2uq.datamodules._data.arrays import Normalization
from lightning_n2uq.datamodules._data.cifar import CIFARDataModule


class CIFAR100DataModule(CIFARDataModule):
    """CIFAR-100; sources and arguments are described at `CIFARDataModule`."""

    classes: ClassVar[int] = 100
    # Over all pixels of the 50,000 official training images, pixels 0..255 divided by 255.
    statistics: ClassVar[Normalization] = Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    pickles: ClassVar[str] = "cifar-100-python"
    torchvision_name: ClassVar[str] = "CIFAR100"
