"""A LightningModule and data of a user's own, as a file in the current folder."""

SOURCE = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Regressor(LightningModule):
    def __init__(self, width: int = 16):
        super().__init__()
        layers = [nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)]
        self.net = nn.Sequential(*layers)
        self.example_input_array = torch.zeros(2, 4)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("val_loss", self.training_step(batch, index))

    def test_step(self, batch, index):
        self.log("test/loss", self.training_step(batch, index))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Sized(Regressor):
    def __init__(self, num_classes: int = 3):
        super().__init__()
        print("classes", num_classes)


class Broken(Regressor):
    def __init__(self):
        super().__init__()
        self.missing.append(3)


class Data(LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x[:, :1] * x[:, 1:2]), batch_size=16)

    val_dataloader = test_dataloader = train_dataloader


class ClassData(Data):
    num_classes = 7
"""

CONFIG = """
model: {class_path: users_own.Regressor}
data: {class_path: users_own.Data}
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_model_summary: false
  callbacks:
    - {class_path: QuantizationMonitor}
    - class_path: QuantizeModel
      init_args: {policy: {weight_bits: 2, activation_bits: 2}}
"""
