"""LightningModules of users, of which none knows of quantization, and trainers for them."""

import torch
from lightning.pytorch import LightningModule
from tiny_training import trainer as trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def network(width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.GELU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.GELU(),
        nn.Conv2d(width, width, 3, padding=1, groups=width),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 4),
    )


class PlainClassifier(LightningModule):
    """Takes nothing, saves no hyperparameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = network()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_loss", nn.functional.cross_entropy(self(x), y))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01, weight_decay=0.1)


class LateClassifier(PlainClassifier):
    """Builds its network in `configure_model`, without asking whether it is there."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        torch.manual_seed(1)
        self.net = network()


class LastClassifier(PlainClassifier):
    """Runs another layer first than it registers first."""

    def __init__(self):
        super().__init__()
        self.head, self.stem = nn.Conv2d(8, 4, 1), nn.Conv2d(3, 8, 1)
        self.box = nn.Conv2d(8, 4, 1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.net = nn.Identity()

    def forward(self, x):
        y = torch.relu(self.body(torch.relu_(self.stem(x))))
        return (self.head(y) + self.box(y)).mean((2, 3))


def data(count=64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 3, 8, 8, generator=generator) + torch.randn(count, 1, 1, 1, generator=generator)
    return TensorDataset(x, (x[:, :, :4].mean((1, 2, 3)) > 0).long() + 2 * (x[:, 0, 0, 0] > 0).long())


def loader(batch_size=16, count=64, shuffle=False):
    return DataLoader(data(count), batch_size=batch_size, shuffle=shuffle)
