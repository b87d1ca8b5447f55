"""Programs in processes of their own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def run(words: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 900) -> str:
    """Runs a program, which has to succeed, and returns what it printed.

    Args:
        words: The program and its arguments.
        cwd: The folder to run in.
        env: Its environment (default: this process's).
        timeout: Seconds.
    """
    done = subprocess.run(
        words, cwd=cwd, env=env or os.environ, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
