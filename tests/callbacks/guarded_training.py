"""Networks with batch norm, data that break at a chosen step, and what two guarded ranks run."""

import json
import os
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from tiny_training import trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_n2uq.callbacks import NonFiniteError, NonFiniteGuard
from lightning_n2uq.layers import QuantLinear, QuantSpec

STEP_KINDS = ("input", "loss", "gradient", "constant_batch")


class GuardedModule(LightningModule):
    """Batch norm, two quantized layers; `breaks` maps (rank, batch) to what happens there."""

    def __init__(self, breaks=None, optimizer="sgd", constant=1.0):
        super().__init__()
        torch.manual_seed(1)
        spec = QuantSpec(2, 2)
        self.norm = nn.BatchNorm1d(8)
        self.net = nn.Sequential(QuantLinear(8, 16, spec=spec), nn.PReLU(), QuantLinear(16, 4, spec=spec))
        self.breaks, self.kind, self.constant = breaks or {}, optimizer, constant

    def on_before_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        what = self._what(self.trainer.fit_loop.batch_idx + 1)  # the loop counts on after the transfer
        if what == "input":
            x = x.clone()
            x[0, 3] = float("nan")
        return (torch.full_like(x, self.constant) if what == "constant_batch" else x), y

    def _what(self, index):
        return self.breaks.get((self.global_rank, index))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(self.norm(x)), y)
        return loss * float("inf") if self._what(batch_idx) == "loss" else loss

    def on_after_backward(self):
        if self._what(self.trainer.fit_loop.batch_idx) == "gradient":
            self.net[2].weight.grad[0, 0] = float("nan")
        if self._what(self.trainer.fit_loop.batch_idx) == "large":
            self.net[2].weight.grad[0, 0] = 1e30

    def configure_optimizers(self):
        if self.kind == "adam":
            return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(48, 8, generator=generator)
        return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=8)


class Frozen(Callback):
    """Everything that a step changes, before and after every batch."""

    def __init__(self):
        self.before, self.after = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.append(snapshot(trainer, pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append(snapshot(trainer, pl_module))


def snapshot(trainer, module):
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for index, entries in trainer.optimizers[0].state_dict()["state"].items():
        state.update({f"{index}.{name}": value.clone() for name, value in entries.items()})
    return state


def train_ranks(folder, breaks, strategy, action):
    """One epoch on two ranks; every rank writes its parameters, counts and how it ended."""
    os.makedirs(folder, exist_ok=True)
    seed_everything(0, verbose=False)
    guard = TellingGuard(**dict.fromkeys(STEP_KINDS, action), parameter="off" if action == "off" else "stop")
    module = GuardedModule(breaks)
    runner = trainer(
        folder, [guard, Ending(folder, guard)], max_epochs=1, devices=2, strategy=strategy,
        use_distributed_sampler=False,
    )  # fmt: skip
    runner.fit(module)


class Ending(Callback):
    """Writes how every rank ended."""

    def __init__(self, folder, guard):
        self.folder, self.guard = folder, guard

    def write(self, trainer, pl_module, error):
        state = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        finite = bool(torch.isfinite(state).all())
        row = {
            "parameters": state.tolist(),
            "finite": finite,
            "counts": self.guard.counts,
            "step": trainer.global_step,
            "error": error,
        }
        path = Path(self.folder, f"rank{trainer.global_rank}.json")
        path.with_suffix(".part").write_text(json.dumps(row))
        path.with_suffix(".part").replace(path)

    def on_train_end(self, trainer, pl_module):
        self.write(trainer, pl_module, None)


class TellingGuard(NonFiniteGuard):
    """Writes how its rank was stopped: in a worker process Lightning calls no `on_exception`."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        try:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
        except NonFiniteError as error:
            ending = next(c for c in trainer.callbacks if isinstance(c, Ending))
            ending.write(trainer, pl_module, str(error))
            deadline = time.monotonic() + 20  # the launcher ends the others once one rank has failed
            while len(list(Path(ending.folder).glob("rank*.json"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            raise
