"""Writes checkpoints: one is there as a whole under its name, or the one before it still is."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from typing_extensions import override

from lightning_n2uq.checkpointing import identity
from lightning_n2uq.checkpointing.reading import read_file
from lightning_n2uq.checkpointing.seal import seal
from lightning_n2uq.utils import compat_lightning
from lightning_n2uq.utils.atomic import replacing


class CheckpointWriteError(OSError):
    """A checkpoint could not be written, for example on a full disk; the message is one line."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's plugin for reading and writing checkpoints, for `Trainer(plugins=[AtomicCheckpointIO()])`.

    A file is written beside its place, sealed with a digest, brought to the disk and renamed; a crash at any
    moment leaves the previous file or the new one. Reading compares the digest and never runs code from the
    file. Every checkpoint carries the package's version and git revision. Addresses (`s3://..`) are left to
    Lightning's own way, without digest, but still without running code. Hyperparameters that hold code, with
    which no such file can be read again, are said at the first save.
    """

    _looked = False

    @override
    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any | None = None,  # Lightning's signature
    ) -> None:
        """Writes the file; raises `CheckpointWriteError` and leaves what was there if that fails."""
        if os.path.basename(path) == compat_lightning.CHILD_WEIGHTS:
            # Plain weights, for the process that waits.
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        identity.stamp(checkpoint)
        if not self._looked:
            self._looked = True
            _warn_of_code(checkpoint)
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            write_atomically(checkpoint, os.fspath(path))
        except (OSError, RuntimeError) as error:
            reason = disk_error(error)
            if reason is None:
                raise
            raise CheckpointWriteError(
                f"checkpoint: cannot write {os.fspath(path)!r} ({reason}); "
                "checkpoints written before it are untouched"
            ) from error

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, loc: storage,  # Lightning's signature
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads the file, as tensors and plain values only, whatever `weights_only` says."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        checkpoint: dict[str, Any] = read_file(os.fspath(path), "ckpt_path", map_location)
        if os.path.basename(path) == compat_lightning.CHILD_WEIGHTS:
            return checkpoint
        identity.check_training_file(checkpoint, os.fspath(path), "ckpt_path", resuming=False)
        difference = identity.other_version(checkpoint)
        if difference:
            rank_zero_warn(f"ckpt_path: {os.fspath(path)!r} was {difference}")
        return checkpoint


def _warn_of_code(checkpoint: dict[str, Any]) -> None:
    """Says which hyperparameters will keep the file from being read, while that can still be changed."""
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        for name, value in dict(checkpoint.get(key) or {}).items():
            if not _is_plain(value):
                rank_zero_warn(
                    f"checkpoint: {key}.{name} is a {type(value).__name__}, more than tensors and plain "
                    "values: the file cannot be resumed or read without running its code; leave it out with "
                    f"save_hyperparameters(ignore=[{name!r}])"
                )


def _is_plain(value: object) -> bool:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError):
        return False
    return True


def write_atomically(checkpoint: dict[str, Any], path: str) -> None:
    """Writes and seals a file that is on the disk, whole, when this returns."""
    with replacing(path, durable=True) as partial, partial.open("w+b") as file:
        torch.save(checkpoint, file)
        seal(file)


def disk_error(error: BaseException) -> str | None:
    """Returns the system's words for a failed write; torch's writer hides them behind a RuntimeError."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return "the disk took only a part of it" if "PytorchStreamWriter" in str(error) else None
