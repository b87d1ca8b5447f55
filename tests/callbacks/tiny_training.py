"""A network of two quantized layers, and trainers that run it in a blink; workers import it too."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_n2uq.layers import QuantLinear, QuantSpec


class TinyModule(LightningModule):
    def __init__(self, bits=2, optimizer="sgd", spec=None):
        super().__init__()
        spec = spec or QuantSpec(bits, bits)
        torch.manual_seed(1)
        self.net = nn.Sequential(QuantLinear(8, 16, spec=spec), nn.PReLU(), QuantLinear(16, 4, spec=spec))
        self.optimizer_name = optimizer
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", nn.functional.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[self.optimizer_name]
        return kind(self.parameters(), lr=0.05)


def data(count=64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 8, generator=generator).abs()
    return TensorDataset(x, (x[:, :4]).argmax(1))


def loader(batch_size=8, count=64):
    return DataLoader(data(count), batch_size=batch_size)


def trainer(tmp_path, callbacks=(), **options):
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **{**defaults, **options})
