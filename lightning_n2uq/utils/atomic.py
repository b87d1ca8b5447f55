"""Files that are there as a whole under their name, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"


@contextlib.contextmanager
def replacing(path: str | Path, *, shared: bool = False, durable: bool = False) -> Iterator[Path]:
    """Yields a path beside `path` to write to, which takes `path`'s place when the block ends.

    If the block raises, the new file is removed and what was under `path` stays. Missing folders are made.

    Args:
        path: The file to write or replace.
        shared: Whether several processes may write the file at once; each then has a temporary file of its
            own. Otherwise the name is fixed, so that a killed process leaves at most one behind.
        durable: Brings the content, then the rename, to the disk before the block is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}{'.' + secrets.token_hex(4) if shared else ''}{PARTIAL}")
    try:
        yield partial
        if durable:
            _sync(partial)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    if durable and os.name != "nt":  # folders cannot be opened there
        _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
