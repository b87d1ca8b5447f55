"""A small U-Net of one's own, on made-up scenes of discs. Nothing here knows of quantization."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Returns a convolution with norm and activation."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(LightningModule):
    """Finds the pixels of discs.

    Args:
        width: The channels of the finest maps.
        lr: The learning rate.
    """

    def __init__(self, width: int = 16, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.down1, self.down2 = block(1, width), block(width, 2 * width)
        self.bottom = block(2 * width, 2 * width)
        self.up2, self.up1 = block(4 * width, width), block(2 * width, width)
        self.classify = nn.Conv2d(width, 1, 1)
        self.pool, self.enlarge = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        self.example_input_array = torch.zeros(2, 1, 16, 16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns a logit per pixel."""
        fine = self.down1(images)
        middle = self.down2(self.pool(fine))
        coarse = self.bottom(self.pool(middle))
        middle = self.up2(torch.cat([middle, self.enlarge(coarse)], 1))
        return self.classify(self.up1(torch.cat([fine, self.enlarge(middle)], 1)))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Returns the loss of a batch."""
        images, masks = batch
        loss = nn.functional.binary_cross_entropy_with_logits(self(images), masks)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Logs the overlap of found and true discs."""
        images, masks = batch
        found, wanted = self(images) > 0, masks > 0.5
        overlap = (found & wanted).sum() / (found | wanted).sum().clamp(min=1)
        self.log("val_iou", overlap, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


class Discs(LightningDataModule):
    """Bright discs on noise, with their masks.

    Args:
        count: The number of training images.
        batch_size: Images per step and process.
    """

    def __init__(self, count: int = 256, batch_size: int = 16) -> None:
        super().__init__()
        self.count, self.batch_size = count, batch_size

    def _draw(self, count: int, seed: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        centre = torch.randint(4, 12, (count, 2, 1, 1), generator=generator)
        radius = torch.randint(2, 5, (count, 1, 1), generator=generator)
        along = torch.arange(16)
        inside = (along[:, None] - centre[:, 0]) ** 2 + (along - centre[:, 1]) ** 2 <= radius**2
        masks = inside[:, None].float()
        return TensorDataset(masks + 0.5 * torch.randn(masks.shape, generator=generator), masks)

    def train_dataloader(self) -> DataLoader:
        """Returns the training images."""
        return DataLoader(self._draw(self.count, 0), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Returns other images."""
        return DataLoader(self._draw(64, 1), self.batch_size)
