"""What a failed run means to its user: a mistake in the config, a full disk, or an error with a traceback.

The kind of an error and the place where it was raised decide, not how far the run had come: an image may be
broken and a disk full at any step, and a resumed run has many steps behind it before it does anything.
"""

from __future__ import annotations

import errno
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lightning_n2uq.callbacks import NonFiniteError
from lightning_n2uq.checkpointing import CheckpointWriteError, ExactResume
from lightning_n2uq.cli import origin
from lightning_n2uq.cli.errors import is_out_of_memory, is_user_error
from lightning_n2uq.cli.own_code import where
from lightning_n2uq.cli.rank_failures import rank_failure

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}


class TrainingFailedError(RuntimeError):
    """An error after training had begun: not a mistake in the config, so it keeps its traceback."""


def impossible(what: str, error: Exception) -> ValueError:
    """Returns the error to show for one before the first batch, which only the given values can cause."""
    if known := _missing_part(error):
        return known
    if place := where(error):
        return ValueError(f"{_reason(error)} ({place}); --debug shows the traceback")
    return ValueError(f"config: nothing can be built from {what} ({_reason(error)}); --debug shows where")


def meaning(error: Exception, trainer: Trainer, command: str, run_dir: str) -> Exception:
    """Returns the error to raise for one that ended a run, which may be `error` itself."""
    if isinstance(error, NonFiniteError):
        return error
    if full := _write_error(error):
        return full
    if is_out_of_memory(error):
        return error
    if among := rank_failure(error, trainer.global_rank, trainer.global_step):
        return among
    if outside := _from_outside(error, trainer, run_dir):
        return outside
    if command == "fit" and _has_trained(trainer):
        return TrainingFailedError(
            f"training failed at step {trainer.global_step} ({_reason(error)}), its files are in {run_dir}"
        )
    if is_user_error(error) or origin.from_batch(error):
        return error
    return impossible("these values", error)


def _missing_part(error: Exception) -> ValueError | None:
    """Returns what to do about a logger that cannot start."""
    text = str(error)
    if type(error).__name__ == "UsageError" and "API key" in text:
        return ValueError(
            "wandb: nobody is logged in to Weights & Biases; allowed are `wandb login` or the variable "
            "WANDB_API_KEY before, or --wandb offline"
        )
    if isinstance(error, ImportError) and "tensorboard" in text.lower():
        return ValueError("trainer.logger: TensorBoardLogger needs a package, pip install tensorboard")
    return None


def _from_outside(error: Exception, trainer: Trainer, run_dir: str) -> Exception | None:
    """Returns what to show for an error that disk, data, checkpoint or config cause, at whatever step."""
    if isinstance(error, MisconfigurationException):
        return error
    if "Early stopping conditioned on metric" in str(error):  # a plain RuntimeError of Lightning's
        return ValueError(f"EarlyStopping.monitor: {_reason(error)}")
    if origin.from_data(error) and is_user_error(error):
        return ValueError(origin.without_worker_traceback(error))
    if origin.lost_worker(error):
        return ValueError(
            f"data.num_workers: a worker process of the loader is lost ({_reason(error)}); allowed are as "
            "many as memory and /dev/shm have room for, 0 loads without them"
        )
    if isinstance(error, OSError) and error.errno is not None:
        named = error.filename is not None or error.errno not in _DISK
        return error if named else ValueError(f"disk: cannot write to {run_dir!r} ({error.strerror})")
    if origin.from_restoring(error):
        if str(error).startswith("ckpt_path") or "in loading state_dict" in str(error):
            return error
        return ValueError(
            f"ckpt_path: cannot go on from {trainer.ckpt_path!r} with this config ({_reason(error)}); "
            "--debug shows where"
        )
    return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _write_error(error: BaseException | None) -> CheckpointWriteError | None:
    """The failed checkpoint behind an error: loggers on the same full disk fail while it is handled."""
    while error is not None and not isinstance(error, CheckpointWriteError):
        error = error.__cause__ or error.__context__
    return error


def _has_trained(trainer: Trainer) -> bool:
    """Returns whether this process has trained a step, whatever the checkpoint had behind it."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    starts = [c.first_step for c in callbacks if isinstance(c, ExactResume)]
    return any(start is not None and trainer.global_step > start for start in starts)
