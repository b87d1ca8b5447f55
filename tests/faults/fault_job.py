"""A small training job in which faults happen; every rank's process imports its body from here."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_n2uq.distributed import exchange
from lightning_n2uq.strategies import NUQSGDStrategy

WORLD = 4


class Small(lightning.LightningModule):
    """A network of two layers; steps take at least ``pause`` seconds."""

    def __init__(self, width=64, pause=0.02):
        super().__init__()
        self.pause = pause
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 4))

    def training_step(self, batch, _):
        time.sleep(self.pause)
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, _):
        time.sleep(self.pause)
        self.log("score", self.net(batch[0]).mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Progress(lightning.Callback):
    """Writes where this rank is; ``begins`` counts steps that began, also those of validation."""

    def __init__(self, folder, rank):
        self.path, self.begins = Path(folder, f"progress{rank}"), {"train": 0, "validation": 0}

    def _write(self, kind):
        self.begins[kind] += 1
        draft = self.path.with_suffix(".new")
        draft.write_text(json.dumps(self.begins | {"pid": os.getpid(), "time": time.time()}))
        draft.replace(self.path)

    def on_train_batch_start(self, *_):
        self._write("train")

    def on_validation_batch_start(self, *_):
        self._write("validation")


class Mishap(lightning.Callback):
    """Raises in the forward pass of a step, the way a user's own code does."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_train_batch_start(self, trainer, module, *_):
        if trainer.global_step == self.step:
            module.net.register_forward_pre_hook(self._raise)

    def _raise(self, *_):
        raise self.error


def data():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(1024, 32, generator=generator), torch.randint(4, (1024,), generator=generator)
    return DataLoader(TensorDataset(x, y), 4)


def newest(folder):
    """Return the newest whole checkpoint, or None."""
    found = sorted(Path(folder).glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    return str(found[-1]) if found else None


def fit(
    folder,
    rank,
    *,
    steps=40,
    timeout=6.0,
    nodes=1,
    mishap=None,
    config=None,
    width=64,
    pause=0.02,
    validate=None,
    resume=False,
):
    """Train ``steps`` steps with a checkpoint every 5; return the final parameters' sum and the start."""
    callbacks = [
        Progress(folder, rank),
        ModelCheckpoint(
            dirpath=folder,
            filename="at={step}",
            every_n_train_steps=5,
            save_top_k=-1,
            auto_insert_metric_name=False,
        ),
    ]
    if mishap is not None:
        callbacks.append(Mishap(*mishap))
    settings = {"bucket_size": 64, "min_numel": 16, "error_feedback": True} | (config or {})
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=WORLD // nodes,
        num_nodes=nodes,
        strategy=NUQSGDStrategy(timeout=timedelta(seconds=timeout), **settings),
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0 if validate is None else 50,
        val_check_interval=validate,
    )
    start = newest(folder) if resume else None
    module = Small(width, pause)
    loader = data()
    trainer.fit(module, loader, loader, ckpt_path=start)
    total = float(sum(parameter.double().sum() for parameter in module.parameters()))
    return {"start": start, "steps": trainer.global_step, "total": total}


def enter_network(name):
    """Move this process, which has one thread yet, into a network namespace."""
    import ctypes

    with open(f"/var/run/netns/{name}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), f"setns to {name}")


def rank_main(rank, folder, environment, arguments, own):
    """Body of a rank's process: ends as a script does, with its traceback on stderr and exit code 1."""
    output = os.open(os.path.join(folder, f"output{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if own.get("network"):
        enter_network(own["network"])
    if own.get("version"):
        exchange.__version__ = own["version"]
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        found = fit(folder, rank, **(arguments | own.get("arguments", {})))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        sys.exit(1)
    Path(folder, f"result{rank}").write_text(json.dumps(found))
