"""What a failed run means to its user: a mistake in the config, a full disk, or an error with a traceback."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lightning_n2uq.callbacks import NonFiniteError
from lightning_n2uq.checkpointing import CheckpointWriteError
from lightning_n2uq.cli.errors import is_out_of_memory, is_user_error


class TrainingFailedError(RuntimeError):
    """An error after training had begun: not a mistake in the config, so it keeps its traceback."""


def impossible(what: str, error: Exception) -> ValueError:
    """Returns the error to show for one before the first batch, which only the given values can cause."""
    reason = " ".join(str(error).split())
    return ValueError(
        f"config: nothing can be built from {what} ({type(error).__name__}: {reason}); --debug shows where"
    )


def meaning(error: Exception, trainer: Trainer, command: str, run_dir: str) -> Exception:
    """Returns the error to raise for one that ended a run, which may be `error` itself."""
    if isinstance(error, NonFiniteError):
        return error
    if full := _write_error(error):
        return full
    if is_out_of_memory(error):
        return error
    if trainer.global_step and command == "fit":
        return TrainingFailedError(
            f"training failed at step {trainer.global_step}, its files are in {run_dir}"
        )
    if is_user_error(error) or _has_run_batches(trainer):
        return error
    return impossible("these values", error)


def _write_error(error: BaseException | None) -> CheckpointWriteError | None:
    """The failed checkpoint behind an error: loggers on the same full disk fail while it is handled."""
    while error is not None and not isinstance(error, CheckpointWriteError):
        error = error.__cause__ or error.__context__
    return error


def _has_run_batches(trainer: Trainer) -> bool:
    epoch = trainer.fit_loop.epoch_loop
    loops: Any = (epoch, epoch.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    return any(loop.batch_progress.total.ready for loop in loops)
