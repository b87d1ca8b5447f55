"""CIFAR-10."""

from pathlib import Path
from typing import Any, ClassVar

from lightning_n2uq.datamodules.arrays import Normalization
from lightning_n2uq.datamodules.cifar import CIFARDataModule


class CIFAR10DataModule(CIFARDataModule):
    """CIFAR-10; sources and arguments are described at `CIFARDataModule`."""

    classes: ClassVar[int] = 10
    # Over all pixels of the 50,000 official training images, pixels 0..255 divided by 255.
    statistics: ClassVar[Normalization] = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    pickles: ClassVar[str] = "cifar-10-batches-py"

    def official(self, train: bool, download: bool) -> Any:  # noqa: ANN401  (torchvision comes late)
        """See the base class."""
        from torchvision.datasets import CIFAR10  # here: importing torchvision takes a second

        return CIFAR10(str(Path(self.root).expanduser()), train=train, download=download)
