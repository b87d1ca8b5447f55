"""Training on one or two processes with the same global batches; what the processes run is importable."""

import json
import os
from pathlib import Path

import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.loggers import CSVLogger
from tiny_training import TinyModule, data, loader, trainer
from torch.utils.data import DataLoader, DistributedSampler

from lightning_n2uq.callbacks import EntropyRegularizer, QuantizationMonitor, ThresholdAnnealing, TorchCompile
from lightning_n2uq.callbacks._common.quantized_layers import quantized_layers


class RankedModule(TinyModule):
    """Takes every `ranks`-th sample in order, so that global batches do not depend on the ranks."""

    def train_dataloader(self):
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(data(), ranks, rank, shuffle=False)
        return DataLoader(data(), 16 // ranks, sampler=sampler)

    def val_dataloader(self):
        return loader()


class Outcome(Callback):
    """Writes every rank's parameters at the end."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        values = torch.cat([p.detach().flatten() for p in pl_module.parameters()]).tolist()
        bits = [layer.activation_quantizer.bits for layer in quantized_layers(pl_module)]
        path = Path(self.folder, f"rank{trainer.global_rank}.json")
        calls = [c.calls for c in trainer.callbacks if isinstance(c, TorchCompile)]
        path.write_text(json.dumps({"parameters": values, "bits": bits, "calls": calls}))


def train(folder, ranks, bits=None, strategy="ddp_fork", instead=None):
    """Two epochs over 64 samples in global batches of 16, three callbacks; another instead of the penalty."""
    os.makedirs(folder, exist_ok=True)
    seed_everything(0, verbose=False)
    schedule = {} if bits is None else {"bits": bits, "bits_at": [0.5 * i for i in range(len(bits))]}
    callbacks = [
        ThresholdAnnealing(0.0, 0.9 if instead is None else 0.4, **schedule),
        EntropyRegularizer(0.1, log_every_n_steps=2) if instead is None else instead,
        QuantizationMonitor(every_n_steps=2),
        Outcome(folder),
    ]
    options = {"devices": ranks, "strategy": strategy} if ranks > 1 else {}
    options["use_distributed_sampler"] = False
    runner = trainer(folder, callbacks, logger=CSVLogger(folder, "", ""), log_every_n_steps=1, **options)
    runner.fit(RankedModule())
