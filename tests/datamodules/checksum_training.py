"""A linear classifier on the digits that keeps what it saw, trained by a real trainer."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy

from lightning_n2uq.datamodules import DigitsDataModule

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Linear(LightningModule):
    """A linear classifier that keeps a checksum of every training batch it sees."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        self.seen = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append((self.current_epoch, batch_idx, images.double().sum().item(), labels.tolist()))
        return cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_loss", cross_entropy(self.layer(images.flatten(1)), labels), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return batch[1]

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def digits(**changes):
    return DigitsDataModule(**{"batch_size": 200, "seed": 3, **changes})


def fit(data, *, epochs, ckpt_path=None, callbacks=(), **changes):
    model = Linear()
    trainer = Trainer(
        max_epochs=epochs,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        callbacks=list(callbacks),
        **{**QUIET, **changes},
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model
