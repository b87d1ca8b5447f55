"""Who wrote a checkpoint: the package's version and, in a git checkout, its revision."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from lightning_n2uq.utils.version import __version__, git_revision

VERSION_KEY = "lightning_n2uq_version"
REVISION_KEY = "lightning_n2uq_revision"


def stamp(checkpoint: MutableMapping[str, Any]) -> None:
    """Adds version and revision in place; those that are there already are replaced."""
    checkpoint[VERSION_KEY] = __version__
    checkpoint[REVISION_KEY] = git_revision()


def other_version(checkpoint: Mapping[str, Any]) -> str | None:
    """Returns `written by version .., this is ..` where they differ; None for ours and unstamped files."""
    written = checkpoint.get(VERSION_KEY)
    if written is None or written == __version__:
        return None
    return f"written by version {written} ({checkpoint.get(REVISION_KEY, 'unknown')}), this is {__version__}"


def check_training_file(checkpoint: object, path: str, argument: str, resuming: bool) -> None:
    """Refuses what the Trainer could not use, in one line instead of a KeyError later.

    Args:
        checkpoint: What the file holds.
        path: Shown in the message.
        argument: The user's name for the path.
        resuming: Whether training goes on from it, which needs more than weights.

    Raises:
        ValueError: It was not written by the Trainer, or holds weights only where more is needed.
    """
    needed = ("state_dict", "pytorch-lightning_version")
    missing = [key for key in needed if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise ValueError(
            f"{argument}: {path!r} is not a checkpoint of this package's training (no {', '.join(missing)})"
        )
    if resuming and isinstance(checkpoint, dict) and "optimizer_states" not in checkpoint:
        raise ValueError(
            f"{argument}: {path!r} holds weights only, training cannot go on from it; "
            "start a new run with --model.init_from"
        )
