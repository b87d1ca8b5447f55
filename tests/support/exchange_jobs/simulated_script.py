"""Trains with `nuqsgd` on two ranks, under Lightning's launcher; each saves its weights and buffers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_n2uq.strategies import NUQSGDStrategy

RANKS, STEPS = 2, 5
SETTINGS = {"bits": 2, "levels": "uniform", "norm": "linf", "bucket_size": 64, "min_numel": 16}


class Normed(LightningModule):
    """A network with running statistics; the first step trains nothing, since DDP lays it out otherwise."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 3))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        return loss if self.global_step else loss * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


def batches(count=RANKS * STEPS):
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(6, 8, generator=generator), torch.randint(3, (6,), generator=generator))
        for _ in range(count)
    ]


def fit(folder, own, **options):
    module = Normed()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=0.5,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(own, batch_size=None))
    return module.state_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    found = fit(sys.argv[1], batches()[rank::RANKS], devices=RANKS, strategy=NUQSGDStrategy(**SETTINGS))
    torch.save(found, Path(sys.argv[1]) / f"rank{rank}.pt")
