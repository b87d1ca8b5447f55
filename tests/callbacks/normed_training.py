"""A network of two quantized layers with batch norms, and its statistics by hand; workers import it too."""

import torch
from lightning.pytorch import LightningModule
from tiny_training import data
from torch import nn
from torch.utils.data import DataLoader

from lightning_n2uq.layers import QuantLinear, QuantSpec


class Normed(LightningModule):
    """Two quantized layers with batch norms, the second of which may be kept in evaluation mode; dropout."""

    def __init__(self, fixed=False, spec=None):
        super().__init__()
        spec = spec or QuantSpec(2, 2)
        torch.manual_seed(1)
        layers = [QuantLinear(8, 16, spec=spec), nn.BatchNorm1d(16), nn.PReLU(), nn.Dropout(0.2)]
        self.net = nn.Sequential(*layers, QuantLinear(16, 4, spec=spec), nn.BatchNorm1d(4))
        self.fixed = fixed
        self.seen = []

    def on_train_epoch_start(self):
        if self.fixed:
            self.net[5].eval()

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(float(x.sum()))
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train/loss", loss, on_epoch=True, sync_dist=True)
        self.log_dict({"train/twice": 2 * loss})
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", nn.functional.cross_entropy(self.net(x), y), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def loader(**options):
    return DataLoader(data(), batch_size=8, **{"shuffle": True, **options})


def statistics(module):
    return [x.clone() for name, x in module.named_buffers() if name.endswith(("running_mean", "running_var"))]


def by_hand(module, batches):
    """Plain averages over batches of the network as evaluated, layer by layer."""
    sums, module = None, module.eval()
    with torch.no_grad():
        for x, _ in batches:
            values = []
            for layer in module.net:
                if isinstance(layer, nn.BatchNorm1d):
                    values += [x.mean(0), x.var(0)]
                    x = (x - x.mean(0)) / (
                        x.var(0, correction=0) + layer.eps
                    ).sqrt() * layer.weight + layer.bias
                else:
                    x = layer(x)
            sums = values if sums is None else [a + b for a, b in zip(sums, values, strict=True)]
    return [x / len(batches) for x in sums]
