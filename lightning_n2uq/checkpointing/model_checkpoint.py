"""A `last.ckpt` that is the last: what a killed run goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from lightning_n2uq.utils import compat_lightning


class BestAndLastModelCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` that renews `last.ckpt` at the end of every epoch that it watches.

    Lightning 2.6 writes `last.ckpt` only beside a checkpoint that is among the best, so that a run killed
    long after its best epoch would have to repeat everything since.

    A checkpoint that is due by steps or time is written after the validation, or the epoch, that ends with
    the step: Lightning resumes a file written before without them. Arguments are those of `ModelCheckpoint`.
    """

    _due: tuple[Any, Any, int] | None = None  # the batch whose checkpoint waits for what follows

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
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves by steps or time, unless a validation or the end of the epoch follows."""
        if trainer.is_last_batch or compat_lightning.validation_follows(trainer):
            self._due = outputs, batch, batch_idx
        else:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _save_what_is_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due, self._due = self._due, None
        if due is not None:
            super().on_train_batch_end(trainer, pl_module, *due)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves where no validation follows."""
        super().on_train_epoch_end(trainer, pl_module)
        self._save_what_is_due(trainer, pl_module)
        compat_lightning.renew_last(self, trainer, after_training=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after the validation of an epoch."""
        super().on_validation_end(trainer, pl_module)
        if not trainer.is_last_batch:
            self._save_what_is_due(trainer, pl_module)
        compat_lightning.renew_last(self, trainer, after_training=False)
