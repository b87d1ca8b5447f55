"""One command under way: its processes by rank, how it ended, and what it left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

MARK = "CHAOS_ATTEMPT"  # in the environment of the command and of all that it starts
_OWN = ("N2UQ_RUN_DIR", "N2UQ_RESUME_FROM", "N2UQ_DEBUG")


class Run:
    """`n2uq fit --config job.yaml --resume auto` in a job's folder.

    Args:
        folder: The folder, which also takes the output.
        name: Of this attempt: names its output and marks its processes.
        variables: Added to the environment.
        before: Words in front of the command.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        variables: Mapping[str, str] | None = None,
        before: tuple[str, ...] = (),
    ) -> None:
        self.mark = f"{folder.name}-{name}-{os.getpid()}"
        environment = {key: value for key, value in os.environ.items() if key not in _OWN}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled",
            MARK: self.mark,
            **(variables or {}),
        }
        self._err = folder / f"{name}.err"
        words = [*before, sys.executable, "-m", "lightning_n2uq", "fit", "--config", "job.yaml"]
        with (folder / f"{name}.out").open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [*words, "--resume", "auto"], cwd=folder, env=environment, stdout=out, stderr=err
            )
        self.pid = self._process.pid

    def wait(self, seconds: float) -> int | None:
        """Returns the exit code, or None where the command goes on."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def errors(self) -> str:
        """Returns what was written to the standard error so far."""
        return self._err.read_text(errors="replace")

    def processes(self) -> dict[int, int]:
        """Returns ranks by process number; loader workers and the like count for their rank."""
        found: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (variables := _variables(entry)).get(MARK) == self.mark:
                found[int(entry.name)] = int(variables.get("LOCAL_RANK", "0"))
        return found

    def send(self, number: int, rank: int | None = None) -> None:
        """Sends a signal to the first process of a rank (None: the command), if it is still there."""
        pids = [pid for pid, other in self.processes().items() if rank is None or other == rank]
        target = self.pid if rank in (None, 0) else min(pids, default=None)
        if target is not None and self.wait(0) is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(target, number)

    def left_over(self, seconds: float) -> list[int]:
        """Returns the processes that are still there `seconds` after the command's end, and kills them."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return sorted(left)


def _variables(entry: Path) -> dict[str, str]:
    """Returns a process's environment; nothing for those that have ended or belong to the system."""
    try:
        if (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return {}
        text = (entry / "environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(item.partition("=")[::2] for item in text.split("\0"))
