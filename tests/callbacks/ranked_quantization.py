"""`QuantizeModel` on one or two processes with the same global batches; what they run is importable."""

import json
import os
from pathlib import Path

import torch
from any_modules import PlainClassifier, data, trainer
from lightning.pytorch import Callback, seed_everything
from torch.utils.data import DataLoader, DistributedSampler

import lightning_n2uq
from lightning_n2uq.callbacks import QuantizationMonitor, QuantizeModel
from lightning_n2uq.convert import CalibratedInput


class Ranked(PlainClassifier):
    """Takes every `ranks`-th sample in order; its norms would see other batches on two ranks."""

    def __init__(self):
        super().__init__()
        self.net[1] = self.net[4] = torch.nn.Identity()

    def train_dataloader(self):
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        return DataLoader(data(), 16 // ranks, sampler=DistributedSampler(data(), ranks, rank, shuffle=False))

    def val_dataloader(self):
        return DataLoader(data(), 16)


class Outcome(Callback):
    """Writes every rank's offsets after the first batch's forward pass, and its parameters at the end."""

    def __init__(self, folder):
        self.folder, self.offsets = folder, []

    def on_before_backward(self, trainer, pl_module, loss):
        quantizers = [m for m in pl_module.modules() if isinstance(m, CalibratedInput)]
        self.offsets = self.offsets or [m.offset.item() for m in quantizers]

    def on_train_end(self, trainer, pl_module):
        values = torch.cat([p.detach().flatten() for p in pl_module.parameters()]).tolist()
        path = Path(self.folder, f"rank{trainer.global_rank}.json")
        path.write_text(json.dumps({"parameters": values, "offsets": self.offsets}))


def train(folder, strategy=None, ckpt_path=None, epochs=2, converted=True):
    """Trains on one process without a strategy, on two with one; writes a checkpoint."""
    os.makedirs(folder, exist_ok=True)
    seed_everything(0, verbose=False)
    options = {} if strategy is None else {"devices": 2, "strategy": strategy}
    policy = {"weight_bits": 2, "activation_bits": 2}
    callbacks = [QuantizeModel(policy), QuantizationMonitor(dirpath=str(folder)), Outcome(folder)]
    runner = trainer(folder, callbacks, use_distributed_sampler=False, max_epochs=epochs, **options)
    module = Ranked()
    if converted:
        lightning_n2uq.quantize(module, policy)
    runner.fit(module, ckpt_path=ckpt_path)
    runner.save_checkpoint(Path(folder, "end.ckpt"))
