"""The callback that lets an interrupted run end as an uninterrupted one does, bit for bit."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_n2uq.checkpointing import epoch_metrics, metrics_file, randomness, slurm
from lightning_n2uq.checkpointing.signals import StopSignals, name_of

KEY = "exact_resume"
FILE_NAME = "interrupted.ckpt"


class RunInterrupted(SystemExit):  # no error: the way out that was asked for
    """Ends the process: 128 + the signal's number on rank 0; 0 on others, rank 0 speaks for all."""


class ExactResume(Checkpoint):
    """Answers SIGTERM, SIGINT and SIGUSR1 with a checkpoint of the step, and keeps what Lightning forgets.

    When a signal arrives, the step ends (with gradient accumulation: the optimizer step), and so does a
    validation that follows it; then `interrupted.ckpt` is written and the process ends with 143 (SIGTERM),
    130 (SIGINT) or 138 (SIGUSR1). One rank's signal is enough: the ranks agree after every batch.

    Every checkpoint also gets, per rank, the states of the random generators and the running epoch's
    averages, the number of rows in `metrics.csv`, and the row that Lightning logs only after the hook that
    checkpoints are written in. A run resumed on as many ranks is bit-identical to an uninterrupted one; on
    another number a warning says what differs.

    Args:
        dirpath: Folder of `interrupted.ckpt`; None: that of the first `ModelCheckpoint`, else of the Trainer.
        hint: Ends the line that says where the checkpoint is: how to go on.
    """

    def __init__(self, dirpath: str | None = None, hint: str = "resume with ckpt_path={path}") -> None:
        self.dirpath = dirpath
        self.hint = hint
        self._signals = StopSignals()
        self._stop = 0  # the signal that all ranks agreed on
        self._saved: str | None = None
        self._loaded: dict[str, Any] | None = None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep our part until training starts."""
        self._loaded = checkpoint.get(KEY)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add our part. A collective call."""
        pending = _pending_row(trainer)  # before the averages are read: it may compute them
        averages = None if _epoch_ended(trainer) else epoch_metrics.capture(trainer, pl_module)
        own = {"random": randomness.capture(), "epoch": averages}
        rows = metrics_file.count_rows(trainer.loggers) if trainer.is_global_zero else []
        checkpoint[KEY] = {"ranks": _gather(own, trainer), "rows": rows, "pending": pending}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore, then listen to signals in Lightning's place."""
        self._stop, self._saved, self._signals.received = 0, None, 0
        loaded, self._loaded = self._loaded, None
        if trainer.is_global_zero:
            metrics_file.bring_back(trainer.loggers, None if loaded is None else loaded["rows"])
            if loaded is not None and loaded["pending"] is not None:
                metrics_file.log_row(trainer.loggers, loaded["pending"]["row"], loaded["pending"]["step"])
        if loaded is not None:
            _restore_rank(trainer, pl_module, loaded["ranks"])
        _place_loaders(trainer)
        self._signals.watch()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Leave, now that loggers have the last step's row."""
        self._leave_if_saved(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Agree on a signal, and save unless the batch has a sequel that belongs to it."""
        self._stop = self._stop or _agree(self._signals.received, trainer)
        loop: Any = trainer.fit_loop.epoch_loop
        sequel = loop._should_accumulate() or loop._num_ready_batches_reached() or _validates(trainer)
        if self._stop and not sequel:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after the validation that the step led to."""
        if self._stop and not trainer.sanity_checking and trainer.state.fn == "fit":
            self._save(trainer)
            self._leave_if_saved(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after an epoch that no validation follows."""
        if self._stop and not trainer.fit_loop.epoch_loop._should_accumulate():
            self._save(trainer)
            self._leave_if_saved(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run is complete; an older `interrupted.ckpt` has served its purpose."""
        self._signals.release()
        path = Path(self._path(trainer))
        if trainer.is_global_zero and path.is_file():
            path.unlink()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back, and a metrics file that was put aside."""
        self._signals.release()
        if trainer.is_global_zero and not isinstance(exception, RunInterrupted):
            metrics_file.bring_back(trainer.loggers)

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
        environment = trainer._accelerator_connector.cluster_environment
        if (
            isinstance(environment, SLURMEnvironment)
            and environment.auto_requeue
            and name_of(self._stop) == "SIGUSR1"
        ):
            print(slurm.requeue(), file=sys.stderr, flush=True)
        raise RunInterrupted(128 + self._stop)


def _place_loaders(trainer: Trainer) -> None:
    """Tell the loaders where they stopped, which Lightning forgets if they were made before the restore.

    They are where the module asks for ``estimated_stepping_batches``, as schedules do.
    """
    loop = trainer.fit_loop
    if loop._combined_loader is not None and loop._combined_loader_states_to_load:
        loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
        loop._combined_loader_states_to_load = []


def _agree(received: int, trainer: Trainer) -> int:
    """The largest of all ranks' signal numbers, 0 if there was none. A collective call."""
    if trainer.world_size == 1:
        return received
    number = torch.tensor(float(received), device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(number, reduce_op="max"))  # type: ignore[arg-type]


def _validates(trainer: Trainer) -> bool:
    fetcher: Any = trainer.fit_loop._data_fetcher
    return bool(trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher))


def _gather(own: dict[str, Any], trainer: Trainer) -> list[dict[str, Any]]:
    """All ranks' states on rank 0, nothing of use elsewhere."""
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
            "twice or not at all, its averages begin anew, random numbers are others)"
        )
        return
    own = ranks[trainer.global_rank]
    if own["epoch"] is not None:
        epoch_metrics.restore(trainer, pl_module, own["epoch"])
    randomness.restore(own["random"])


def _epoch_ended(trainer: Trainer) -> bool:
    """Whether we are in `on_train_epoch_end`: a resumed run begins with the next epoch."""
    progress = trainer.fit_loop.epoch_progress.total
    return bool(trainer.training and progress.processed == progress.completed + 1)  # type: ignore[attr-defined]


def _pending_row(trainer: Trainer) -> dict[str, Any] | None:
    """The row that Lightning will log after the hook we are in, which a resumed run does not log again."""
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    batches = loop.batch_progress.total
    if trainer.state.fn != "fit" or not trainer.training:
        return None
    step = loop._batches_that_stepped
    processed = batches.processed  # type: ignore[attr-defined]
    if processed == batches.completed + 1:  # in `on_train_batch_end`
        if loop._should_accumulate() or not connector.should_update_logs:
            return None
    elif _epoch_ended(trainer):
        step -= 1
    else:
        return None
    metrics = convert_tensors_to_scalars(connector.metrics["log"])
    if not metrics:
        return None
    step = int(metrics.pop("step", step))
    return {"row": {"epoch": trainer.current_epoch, **metrics}, "step": step}
