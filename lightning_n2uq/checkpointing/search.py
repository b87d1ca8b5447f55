"""Finds the checkpoint that an interrupted run goes on from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lightning_n2uq.checkpointing.identity import check_training_file
from lightning_n2uq.checkpointing.reading import read_file


@dataclass
class Found:
    """The newest whole checkpoint, if any, and one line for every newer file that is no use.

    Attributes:
        path: The file, or None.
        rejected: Why newer files were passed over.
    """

    path: Path | None
    rejected: list[str] = field(default_factory=list)


def newest_checkpoint(
    folder: str | Path, own: str | Path | None = None, wanted: Callable[[Path], bool] = lambda run: True
) -> Found:
    """Returns the newest whole training checkpoint in a folder's runs (`folder/<run>/*.ckpt`) and in `own`.

    Within a run the newest is the one of most steps, since clocks are set back; runs go by the time of their
    last checkpoint. Files that are damaged, refused, or hold weights only are passed over.

    Args:
        folder: The folder of the runs.
        own: A further folder with checkpoints.
        wanted: Whether a run's folder counts.
    """
    found = Found(None)
    runs = [path for path in Path(folder).glob("*") if path.is_dir()]
    runs += [] if own is None or Path(own).resolve() in {run.resolve() for run in runs} else [Path(own)]
    files = {run: [path for path in run.glob("*.ckpt") if path.is_file()] for run in runs}
    for run in sorted(
        (r for r in runs if files[r]), key=lambda r: max(map(_written, files[r])), reverse=True
    ):
        if found.path is None and wanted(run):
            _search(files[run], found)
    return found


def _search(files: list[Path], found: Found) -> None:
    for path in sorted(files, key=lambda file: (_step(file), _written(file)), reverse=True):
        try:
            content = read_file(str(path), "resume")
            check_training_file(content, str(path), "resume", resuming=True)
        except (ValueError, OSError) as error:
            found.rejected.append(str(error))
            continue
        found.path = path
        return


def _written(path: Path) -> tuple[int, str]:
    return path.stat().st_mtime_ns, path.name


def _step(path: Path) -> float:
    """Returns the steps that a checkpoint holds; infinity where nobody knows, so that it is named."""
    try:
        return float(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception:  # a damaged file raises almost anything; `read_file` says what is wrong with it
        return math.inf
