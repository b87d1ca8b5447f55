"""Finds the checkpoint that an interrupted run goes on from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

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


def newest_checkpoint(folder: str | Path, own: str | Path | None = None) -> Found:
    """Returns the newest whole training checkpoint in a folder's runs (`folder/<run>/*.ckpt`) and in `own`.

    Newest is by the time of writing. Files that are damaged, refused, or hold weights only are passed over.
    """
    found = Found(None)
    patterns = [(folder, "*/*.ckpt"), *([] if own is None else [(own, "*.ckpt")])]
    files = {path for place, pattern in patterns for path in Path(place).glob(pattern) if path.is_file()}
    for path in sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True):
        try:
            content = read_file(str(path), "resume")
            check_training_file(content, str(path), "resume", resuming=True)
        except (ValueError, OSError) as error:
            found.rejected.append(str(error))
            continue
        found.path = path
        break
    return found
