"""The callback that lets an interrupted run end with the weights of an uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, StochasticWeightAveraging

from lightning_n2uq.checkpointing import metrics_file, open_gradients, randomness, slurm
from lightning_n2uq.checkpointing.signals import RunInterrupted, StopSignals, name_of
from lightning_n2uq.utils import compat_lightning

KEY = "exact_resume"
FILE_NAME = "interrupted.ckpt"
MARK = "resume/batch"  # logged where an epoch goes on: its averages are of the batches from this one on

_ENDS_ELSEWHERE = (
    "StochasticWeightAveraging: Lightning keeps neither its average nor its schedule exactly in a "
    "checkpoint; this resumed run ends elsewhere than an uninterrupted one"
)


class ExactResume(Checkpoint):
    """Answers SIGTERM, SIGINT and SIGUSR1 with a checkpoint of the step, and keeps what Lightning forgets.

    When a signal arrives, the step ends (with gradient accumulation: the optimizer step), and so does a
    validation, or the epoch, that ends with it; then `interrupted.ckpt` is written and the process ends with
    143 (SIGTERM), 130 (SIGINT) or 138 (SIGUSR1). One rank's signal is enough: they agree after every batch.

    Every checkpoint also gets the states of each rank's random generators, the number of rows in
    `metrics.csv` and, where it is written between accumulated batches, as at a validation amid them, each
    rank's gradients. A run resumed on as many ranks ends with the same weights, optimizer and rows as an
    uninterrupted one. The averages of an epoch that was interrupted are the exception: Lightning keeps none
    in a checkpoint, so they are of the batches since the resume, which a row with `resume/batch` says. On
    another number of ranks a warning says what differs.

    Args:
        dirpath: The folder of `interrupted.ckpt`; None takes that of the first `ModelCheckpoint`, else the
            Trainer's.
        hint: The end of the line that says where the checkpoint is: how to go on.

    Attributes:
        first_step: The step that this process began to train at, None before it did.

    Raises:
        ValueError: When training starts: the checkpoint's optimizer is of another kind.
    """

    first_step: int | None = None

    def __init__(self, dirpath: str | None = None, hint: str = "resume with ckpt_path={path}") -> None:
        self.dirpath = dirpath
        self.hint = hint
        self._signals = StopSignals()
        self._stop = 0  # the signal that all ranks agreed on
        self._saved: str | None = None
        self._loaded: dict[str, Any] | None = None
        self._batches = 0  # of the interrupted epoch, when the checkpoint was written
        self._step = -1  # before the batch

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps our part until training starts."""
        self._loaded, self._batches = checkpoint.get(KEY), _batches_done(checkpoint)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds our part. A collective call."""
        rows = metrics_file.count_rows(trainer.loggers) if trainer.is_global_zero else []
        own: dict[str, Any] = {"random": randomness.capture()}
        if self._accumulating(trainer):
            own["gradients"] = open_gradients.capture(pl_module)
        checkpoint[KEY] = {"ranks": _gather(own, trainer), "rows": rows}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores, then listens to signals in Lightning's place."""
        _check_optimizers(trainer)
        self.first_step = trainer.global_step
        self._stop, self._saved, self._signals.received = 0, None, 0
        self._step = -1
        loaded, self._loaded = self._loaded, None
        if trainer.is_global_zero:
            rows = None if loaded is None else loaded["rows"]
            metrics_file.bring_back(trainer.loggers, rows, trainer.global_step)
        if loaded is not None:
            _restore_rank(trainer, pl_module, loaded["ranks"])
            if any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks):  # type: ignore[attr-defined]
                rank_zero_warn(_ENDS_ELSEWHERE)
            _mark_epoch(trainer, self._batches)
        compat_lightning.place_loaders(trainer)
        if loaded is not None and not self._batches:
            compat_lightning.iterate_again(trainer)
        self._signals.watch()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves, now that loggers have the last epoch's row."""
        self._leave_if_saved(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Leaves, now that loggers have the last step's row."""
        self._leave_if_saved(trainer)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Agrees on a signal, and saves unless the batch has a sequel that belongs to it."""
        self._stop = self._stop or _agree(self._signals.received, trainer)
        sequel = trainer.is_last_batch or compat_lightning.validation_follows(trainer)
        if self._stop and not (sequel or self._accumulating(trainer)):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after a validation in the middle of an epoch."""
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if self._stop and fitting and not (trainer.is_last_batch or self._accumulating(trainer)):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after the epoch that the step ended."""
        if self._stop:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves, or else removes an `interrupted.ckpt` that the complete run has no use for."""
        self._leave_if_saved(trainer)
        self._signals.release()
        path = Path(self._path(trainer))
        if trainer.is_global_zero and path.is_file():
            path.unlink()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the signals back, and a metrics file that was put aside."""
        self._signals.release()
        if trainer.is_global_zero and not isinstance(exception, RunInterrupted):
            metrics_file.bring_back(trainer.loggers)

    def _accumulating(self, trainer: Trainer) -> bool:
        """Returns whether the batch has no optimizer step of its own."""
        return trainer.global_step == self._step

    def _path(self, trainer: Trainer) -> str:
        first = getattr(trainer.checkpoint_callback, "dirpath", None)
        return os.path.join(self.dirpath or first or trainer.default_root_dir, FILE_NAME)

    def _save(self, trainer: Trainer) -> None:
        if getattr(trainer, "fast_dev_run", False):
            self._saved = ""
            return
        path = self._path(trainer)
        trainer.save_checkpoint(path)
        self._saved = path

    def _leave_if_saved(self, trainer: Trainer) -> None:
        if self._saved is None:
            return
        if not trainer.is_global_zero:
            raise RunInterrupted(0)
        where = (
            f"saved in {self._saved}; {self.hint.replace('{path}', self._saved)}"
            if self._saved
            else "nothing saved"
        )
        print(
            f"stopped by {name_of(self._stop)} after step {trainer.global_step}, {where}",
            file=sys.stderr,
            flush=True,
        )
        environment = compat_lightning.cluster_environment(trainer)
        if (
            isinstance(environment, SLURMEnvironment)
            and environment.auto_requeue
            and name_of(self._stop) == "SIGUSR1"
        ):
            print(slurm.requeue(), file=sys.stderr, flush=True)
        raise RunInterrupted(128 + self._stop)


def _agree(received: int, trainer: Trainer) -> int:
    """Returns the largest of all ranks' signal numbers, 0 if there was none. A collective call."""
    if trainer.world_size == 1:
        return received
    number = torch.tensor(float(received), device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(number, reduce_op="max"))  # type: ignore[arg-type]


def _gather(own: dict[str, Any], trainer: Trainer) -> list[dict[str, Any]]:
    """Returns all ranks' states on rank 0, nothing of use elsewhere."""
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return [own]
    out: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    torch.distributed.gather_object(own, out, dst=0)
    return out or []


def _restore_rank(trainer: Trainer, pl_module: LightningModule, ranks: list[dict[str, Any]]) -> None:
    if len(ranks) != trainer.world_size:
        rank_zero_warn(
            f"resume: the checkpoint is of {len(ranks)} processes, this run has {trainer.world_size}: "
            "the result will differ from an uninterrupted run's (images of the interrupted epoch may be seen "
            "twice or not at all, random numbers are others)"
        )
        return
    own = ranks[trainer.global_rank]
    randomness.restore(own["random"])
    open_gradients.restore(pl_module, own.get("gradients", {}))


def _check_optimizers(trainer: Trainer) -> None:
    """Refuses settings of another optimizer, which torch puts into this one's groups without a look."""
    for optimizer in trainer.optimizers:
        kind = type(optimizer).__name__
        missing = {name for group in optimizer.param_groups for name in optimizer.defaults.keys() - group}
        if missing:
            raise ValueError(
                f"optimizer: got {kind}, but the checkpoint's is another (no {', '.join(sorted(missing))}); "
                "allowed is the one that it was trained with, or a new run with --model.init_from"
            )


def _batches_done(checkpoint: dict[str, Any]) -> int:
    """Returns the batches done of an epoch that the checkpoint was written in the middle of, else 0."""
    loop = checkpoint["loops"]["fit_loop"]
    epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
    ended = epochs["processed"] > epochs["completed"] or batches["is_last_batch"]
    return 0 if ended else int(batches["current"]["processed"])


def _mark_epoch(trainer: Trainer, batches: int) -> None:
    """Says, to the user and in every logger, from which batch on the averages of this epoch are."""
    if not batches:
        return
    epoch = trainer.current_epoch
    rank_zero_info(f"resume: averages of epoch {epoch} are of its batches from {batches} on")
    for logger in trainer.loggers:
        logger.log_metrics({"epoch": epoch, MARK: batches}, trainer.global_step)
        logger.save()
