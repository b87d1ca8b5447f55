"""`n2uq fit --resume auto`: which checkpoint and run folder an interrupted run goes on in."""

import os
import sys
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn

from lightning_n2uq.checkpointing import newest_checkpoint, read_file
from lightning_n2uq.checkpointing.identity import check_training_file

_SHARED_VARIABLE = "N2UQ_RESUME_FROM"  # rank 0's choice, for the ranks that Lightning starts


def check_mode(mode: str | None, ckpt_path: str | None) -> None:
    """Refuses other values than `auto`, and two sources at once.

    Raises:
        ValueError: The mode or the pair is not allowed; one line.
    """
    if mode is None:
        return
    if mode != "auto":
        raise ValueError(f"resume: got {mode!r}, allowed is auto (a certain file is named by --ckpt_path)")
    if ckpt_path is not None:
        raise ValueError(f"resume: got 'auto' together with ckpt_path {ckpt_path!r}, allowed is one of them")


def find_checkpoint(root: str, name: str, chosen: str | None = None) -> str | None:
    """Returns the newest whole checkpoint of the runs in `root/name`; says what was found and what was not.

    Args:
        root: The folder that runs lie in.
        name: The config's name.
        chosen: The folder that the config gives to checkpoints (`checkpoint.dirpath`), searched as well; what
            an interruption saves is in the run's folder all the same.
    """
    rank = getattr(rank_zero_only, "rank", 0)
    if rank and _SHARED_VARIABLE in os.environ:
        return os.environ[_SHARED_VARIABLE] or None
    found = newest_checkpoint(Path(root, name), chosen)
    for reason in found.rejected:
        rank_zero_warn(f"{reason}; an earlier checkpoint is used if there is one")
    path = None if found.path is None else str(found.path)
    os.environ[_SHARED_VARIABLE] = path or ""
    if not rank:
        places = [str(Path(root, name)), *([] if chosen is None else [chosen])]
        where = (
            f"going on from {path}" if path else f"no checkpoint in {' or '.join(places)}, starting afresh"
        )
        print(f"resume: {where}", file=sys.stderr)
    return path


def check_file(path: str, command: str) -> None:
    """Refuses a file that the command cannot use, before anything is built.

    Raises:
        ValueError: The file is damaged, carries code, is not ours or holds too little; one line.
    """
    content: Any = read_file(path, "ckpt_path", mmap=True)
    check_training_file(content, path, "ckpt_path", resuming=command == "fit")
    del content
