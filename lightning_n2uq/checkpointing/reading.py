"""Reads a checkpoint file: whole or not at all, and never running code from it."""

from __future__ import annotations

import os
import pickle
from typing import Any

import torch

from lightning_n2uq.checkpointing.seal import is_intact


class DamagedCheckpointError(ValueError):
    """The file is cut short, altered or no checkpoint; the message is one line."""


class RefusedCheckpointError(ValueError):
    """The file holds more than tensors and plain values; nothing in it was run. One line."""


def check_intact(path: str, argument: str) -> None:
    """Compares the file with its digest, where it has one.

    Raises:
        ValueError: There is no such file.
        DamagedCheckpointError: It is cut short or altered, or no checkpoint.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{argument}: no such file {path!r}")
    if is_intact(path) is False:
        raise DamagedCheckpointError(f"{argument}: {path!r} is damaged, cut short, or no checkpoint")


def read_file(
    path: str,
    argument: str = "path",
    map_location: Any = "cpu",  # noqa: ANN401  # torch's type
    mmap: bool = False,
) -> Any:  # noqa: ANN401
    """Returns the tensors and plain values of a file whose digest fits, or that has none (older files).

    Args:
        path: A local file.
        argument: The user's name for the path, used in errors.
        map_location: As in `torch.load`.
        mmap: As in `torch.load`: read tensors only when they are used.

    Raises:
        ValueError: There is no such file.
        DamagedCheckpointError: It is cut short or altered, or no checkpoint.
        RefusedCheckpointError: It carries code.
    """
    check_intact(path, argument)
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:200]
        raise RefusedCheckpointError(
            f"{argument}: refused {path!r}, it holds more than tensors and plain values ({reason})"
        ) from error
    except Exception as error:  # unpickling a damaged file raises almost anything
        reason = str(error).partition(".")[0] or type(error).__name__
        raise DamagedCheckpointError(
            f"{argument}: cannot read {path!r} as a checkpoint ({' '.join(reason.split())[:200]})"
        ) from error
