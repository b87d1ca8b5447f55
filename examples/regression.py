"""Regression of one's own on a table: scikit-learn's 442 patients with diabetes."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Regressor(LightningModule):
    """Predicts a number from ten.

    Args:
        width: The size of hidden layers.
        lr: The learning rate.
    """

    def __init__(self, width: int = 64, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(10, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )
        self.example_input_array = torch.zeros(2, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns predictions `[B]`."""
        return self.net(x)[:, 0]

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Returns the squared error."""
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Logs the squared error."""
        self.log("val_mse", nn.functional.mse_loss(self(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Logs the squared error."""
        self.log("test_mse", nn.functional.mse_loss(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        """Returns AdamW with a schedule per epoch."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"], weight_decay=0.01)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.97),
        }


class Diabetes(LightningDataModule):
    """Features and targets of unit variance.

    Args:
        batch_size: Patients per step and process.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size
        x, y = (torch.tensor(values, dtype=torch.float32) for values in load_diabetes(return_X_y=True))
        self.rows = TensorDataset(x / x.std(0), (y - y.mean()) / y.std())

    def _part(self, start: int, stop: int, shuffle: bool = False) -> DataLoader:
        rows = TensorDataset(*self.rows[start:stop])
        return DataLoader(rows, self.batch_size, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader:
        """Returns most rows."""
        return self._part(0, 320, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Returns others."""
        return self._part(320, 380)

    def test_dataloader(self) -> DataLoader:
        """Returns the rest."""
        return self._part(380, 442)
