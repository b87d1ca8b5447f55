"""Which code is running: the package's version and, in a git checkout, its revision."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

from lightning_n2uq._version import __version__

__all__ = ["UNKNOWN", "__version__", "git_revision"]

UNKNOWN = "unknown"


@functools.cache
def git_revision() -> str:
    """Returns the first 12 digits of the package's commit, with `-dirty` for changed files, or `unknown`."""
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    return answer.stdout.strip() or UNKNOWN
