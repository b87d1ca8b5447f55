"""Run by Lightning's own launcher in the tests of `nuqsgd_local`: every process of the job runs this file."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script it is the folder

from exchange_jobs.trainer_script import Readings, Small, data, fit, parameters, save, trainer
from lightning_n2uq.callbacks import CommunicationMonitor
from lightning_n2uq.checkpointing import ExactResume
from lightning_n2uq.datamodules import SyntheticDataModule
from lightning_n2uq.strategies import LocalNUQSGDStrategy

EXACT = 1 << 20  # rounds in full precision
RESUMED = {"period": 3, "outer_lr": 0.7, "outer_momentum": 0.9, "bits": 8, "levels": "float",
           "error_feedback": True, "min_numel": 16, "bucket_size": 64}  # fmt: skip


class WithNorm(Small):
    """Batch norm, Adam, a parameter that nothing uses and a schedule."""

    def __init__(self, manual=False):
        super().__init__(manual)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))
        self.unused = nn.Parameter(torch.ones(3))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class OnImages(WithNorm):
    def __init__(self):
        super().__init__()
        self.net.insert(0, nn.Flatten())


def fit_images(strategy, ckpt_path=None, **arguments):
    """Trains with loaders that go on in the middle of an epoch."""
    images = SyntheticDataModule(
        num_classes=4, in_channels=2, image_size=4, num_train=64, num_val=8, batch_size=8
    )
    module = OnImages()
    trainer(strategy, **arguments).fit(module, datamodule=images, ckpt_path=ckpt_path)
    return module


class Watch(lightning.Callback):
    """Notes weights after every batch, at validations and at the end."""

    def __init__(self):
        self.batches, self.validations, self.open, self.lr = [], [], [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.batches.append(parameters(module))
        self.open.append(trainer.strategy.rounds.steps)
        self.lr.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_start(self, trainer, module):
        if not trainer.sanity_checking:
            self.validations.append(parameters(module))


class Recording(LocalNUQSGDStrategy):
    """Notes the rank's own weights after every step."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.own = []

    def optimizer_step(self, *arguments, **keywords):
        result = super().optimizer_step(*arguments, **keywords)
        self.own.append(parameters(self.lightning_module))
        return result


MODES = {
    "automatic": {},
    "manual": {"manual": True},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "accumulate": {"accumulate_grad_batches": 2},
    "clip": {"gradient_clip_val": 0.1},
}


def everything(module):
    return torch.cat([value.detach().float().flatten() for value in module.state_dict().values()])


def modes():
    found = {}
    for name, arguments in MODES.items():
        others = {key: value for key, value in arguments.items() if key != "manual"}
        watch = Watch()
        run, module = fit(
            LocalNUQSGDStrategy(period=3), WithNorm("manual" in arguments), callbacks=[watch], **others
        )
        found[name] = {
            "parameters": everything(module),
            "rounds": run.strategy.state.step,
            "validations": watch.validations,
            "batches": torch.stack(watch.batches).float(),
            "open": watch.open,
            "lr": watch.lr,
            "callbacks": [type(callback).__name__ for callback in run.callbacks],
        }
    return found


def resume(folder):
    """An uninterrupted run that saves after every step; runs that go on from three of its checkpoints."""
    saver = ModelCheckpoint(
        dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )
    quiet = {"limit_val_batches": 0, "max_epochs": 2, "enable_checkpointing": True}
    callbacks = [saver, ExactResume(folder)]
    whole = fit_images(LocalNUQSGDStrategy(**RESUMED), callbacks=callbacks, **quiet)
    torch.distributed.barrier()
    found = {"whole": everything(whole), "resumed": {}, "saved": {}, "agreed": {}}
    for step in (4, 6, 7):
        path = str(Path(folder) / f"step={step}.ckpt")
        saved = torch.load(path, weights_only=True)
        found["saved"][step] = [
            saved["nuqsgd_local"]["rounds"]["steps"],
            [sorted(rank) for rank in saved["nuqsgd_local"]["ranks"]],
        ]
        found["agreed"][step] = torch.cat([v.float().flatten() for v in saved["state_dict"].values()])
        callbacks = [ExactResume(folder)]
        module = fit_images(LocalNUQSGDStrategy(**RESUMED), path, callbacks=callbacks, **quiet)
        found["resumed"][step] = everything(module)
    small = ModelCheckpoint(dirpath=folder, filename="small", every_n_train_steps=2)
    no_ranks = LocalNUQSGDStrategy(**RESUMED, save_ranks=False)
    fit_images(no_ranks, callbacks=[small], **quiet | {"max_epochs": 1})
    saved = torch.load(Path(folder) / "small.ckpt", weights_only=True)
    found["small"] = saved["nuqsgd_local"]["ranks"]
    return found


def monitored():
    monitor, readings = CommunicationMonitor(every_n_steps=3), Readings()
    fit(LocalNUQSGDStrategy(period=3), callbacks=[monitor, readings], limit_val_batches=0)
    return {"metrics": readings.last, "summary": monitor.summary}


def plain_mean():
    """Without loss: the weights after a round are the mean of the ranks' own."""
    strategy, start = Recording(period=4, warmup_steps=EXACT), parameters(Small()).clone()
    _, module = fit(strategy, Small(), max_steps=3, limit_val_batches=0)
    return {"start": start, "own": strategy.own[-1], "end": parameters(module)}


def main():
    folder = sys.argv[1]
    torch.set_num_threads(1)
    found = {"modes": modes(), "resume": resume(folder), "monitored": monitored(), "mean": plain_mean()}
    for stage in ("validate", "test"):
        getattr(trainer("nuqsgd_local"), stage)(Small(), data(), verbose=False)
    save(found, folder)


if __name__ == "__main__":
    main()
