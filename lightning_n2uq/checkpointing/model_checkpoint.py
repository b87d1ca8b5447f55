"""A `last.ckpt` that is the last: what a killed run goes on from."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from lightning_n2uq.utils import compat_lightning


class BestAndLastModelCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` that renews `last.ckpt` at the end of every epoch that it watches.

    Lightning 2.6 writes `last.ckpt` only beside a checkpoint that is among the best, so that a run killed
    long after its best epoch would have to repeat everything since. Arguments are those of `ModelCheckpoint`.
    """

    def watch(self, monitor: str | None, mode: str) -> None:
        """Watches another metric, before anything is saved.

        Args:
            monitor: The metric's name; None keeps the last checkpoint.
            mode: `min` or `max`.
        """
        self.monitor, self.mode = monitor, mode
        self.kth_value = torch.tensor(torch.inf if mode == "min" else -torch.inf)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the `last.ckpt` that the run goes on from as it is until there is something new to save."""
        super().on_train_start(trainer, pl_module)
        path = Path(trainer.ckpt_path or "")
        ours = path.name == self.CHECKPOINT_NAME_LAST + self.FILE_EXTENSION
        if ours and self.save_last is True and self.dirpath and path.parent.samefile(self.dirpath):
            compat_lightning.last_is_saved(self, trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves where no validation follows."""
        super().on_train_epoch_end(trainer, pl_module)
        compat_lightning.renew_last(self, trainer, after_training=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after the validation of an epoch."""
        super().on_validation_end(trainer, pl_module)
        compat_lightning.renew_last(self, trainer, after_training=False)
