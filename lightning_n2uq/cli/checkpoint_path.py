"""The file that `--ckpt_path` names: what else a user may give there is told apart and named."""

from __future__ import annotations

from pathlib import Path

from lightning_n2uq.cli.arguments import SPECIAL_CHECKPOINTS

SHARDED = "meta.pt"
"""What a checkpoint has that is a folder, with a shard for every rank."""

FILES = ("best.ckpt", "last.ckpt", "interrupted.ckpt")


def is_file_name(path: object) -> bool:
    """Returns whether a value of `--ckpt_path` names a file: no word of Lightning's, address or registry."""
    text = str(path)
    words = (*SPECIAL_CHECKPOINTS, "null", "None")
    return text not in words and "://" not in text and not text.startswith("registry")


def checkpoint_file(path: str, argument: str) -> str:
    """Returns `path` if it is a checkpoint: a file, or a folder of shards.

    Args:
        path: What the user gave.
        argument: The user's name for it, used in errors.

    Raises:
        ValueError: Nothing is there, or a folder; the message names the checkpoints that lie there.
    """
    place = Path(path).expanduser()
    if place.is_file() or (place / SHARDED).is_file():
        return str(place)
    if not place.is_dir():
        near = _in_folder(place.parent) if place.name else []
        hint = f"; there is {', '.join(near)}" if near else ""
        raise ValueError(f"{argument}: no such file {path!r}{hint}")
    near = _in_folder(place) or _in_folder(place, "*/*.ckpt") or _in_folder(place, "*/*/*/*.ckpt")
    allowed = f"did you mean {near[0]}?" if near else "and no checkpoint lies in it"
    raise ValueError(f"{argument}: got {path!r}, which is a folder, allowed is a checkpoint file; {allowed}")


def _in_folder(folder: Path, pattern: str = "*.ckpt") -> list[str]:
    """Returns the checkpoints in a folder: the best first, of several runs the newest run's."""
    if not folder.is_dir():
        return []
    files = sorted(folder.glob(pattern), key=lambda file: (file.parent.name, file.name), reverse=True)
    order = {name: place for place, name in enumerate(FILES)}
    newest = [file for file in files if file.parent == files[0].parent]
    return [str(file) for file in sorted(newest, key=lambda file: order.get(file.name, len(order)))][:3]
