"""A `last.ckpt` that is the last: what a killed run goes on from."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override


class BestAndLastModelCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` that renews `last.ckpt` at the end of every epoch that it watches.

    Lightning 2.6 writes `last.ckpt` only beside a checkpoint that is among the best, so that a run killed
    long after its best epoch would have to repeat everything since. Arguments are those of `ModelCheckpoint`.
    """

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where no validation follows."""
        super().on_train_epoch_end(trainer, pl_module)
        self._renew_last(trainer, after_training=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after the validation of an epoch."""
        super().on_validation_end(trainer, pl_module)
        self._renew_last(trainer, after_training=False)

    def _renew_last(self, trainer: Trainer, after_training: bool) -> None:
        if not self.save_last or self._every_n_epochs < 1 or self._should_skip_saving_checkpoint(trainer):
            return  # nothing asked for, saved by steps or time, or saved at this step already
        if self._should_save_on_train_epoch_end(trainer) == after_training:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
