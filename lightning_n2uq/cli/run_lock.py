"""One process at a time trains in a folder: two would write the same checkpoints and rows."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from filelock import FileLock, Timeout

NAME = ".lock"


class RunLock:
    """A lock on folders, which the system takes back when the process ends, however it ends."""

    def __init__(self) -> None:
        self._locks: list[FileLock] = []

    def take(self, *folders: str) -> None:
        """Locks the folders, which are made where they are missing; addresses are left out.

        Raises:
            ValueError: Another process has one of them; nothing is locked then.
        """
        local = {os.path.realpath(folder): folder for folder in folders if "://" not in folder}
        for folder in local.values():
            Path(folder).mkdir(parents=True, exist_ok=True)
            lock = FileLock(Path(folder, NAME), timeout=0, thread_local=False)
            try:
                lock.acquire()
            except Timeout:
                self.release()
                raise ValueError(
                    f"run: {folder!r} is being written by another process, allowed is one at a time; "
                    "wait for it, or choose another folder (trainer.default_root_dir, checkpoint.dirpath)"
                ) from None
            self._locks.append(lock)

    def release(self) -> None:
        """Gives all folders back and leaves nothing in them."""
        while self._locks:
            lock = self._locks.pop()
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)  # while it is still ours
            lock.release()
