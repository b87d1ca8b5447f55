"""`n2uq fit --resume auto`: which checkpoint and run folder an interrupted run goes on in."""

import os
import sys
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # Lightning depends on it
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn

from lightning_n2uq.checkpointing import newest_checkpoint, read_file
from lightning_n2uq.checkpointing.identity import check_training_file
from lightning_n2uq.cli.changed_settings import Change, compare
from lightning_n2uq.utils.class_names import saved_class_names

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


def find_checkpoint(root: str, name: str, chosen: str | None, config: str) -> str | None:
    """Returns the newest whole checkpoint of this config's runs; says what was found and what was not.

    A run is of this config if no setting differs that makes another experiment (`changed_settings`): another
    seed or learning rate is another run, even under the same name.

    Args:
        root: The folder that runs lie in.
        name: The config's name.
        chosen: The folder that the config gives to checkpoints (`checkpoint.dirpath`), searched as well; what
            an interruption saves is in the run's folder all the same.
        config: The text of the command's `config.yaml`.

    Raises:
        ValueError: There are checkpoints of this config, and none of them can be used.
    """
    rank = getattr(rank_zero_only, "rank", 0)
    if rank and _SHARED_VARIABLE in os.environ:
        return os.environ[_SHARED_VARIABLE] or None
    others: dict[str, str] = {}
    found = newest_checkpoint(Path(root, name), chosen, lambda run: _is_of(run, config, others))
    if found.path is None and found.rejected:
        raise ValueError(f"{found.rejected[0]}; without --resume a new run starts")
    for reason in found.rejected:
        rank_zero_warn(f"{reason}; an earlier checkpoint is used")
    path = None if found.path is None else str(found.path)
    os.environ[_SHARED_VARIABLE] = path or ""
    if not rank:
        places = " or ".join([str(Path(root, name)), *([] if chosen is None else [chosen])])
        nothing = f"no run of this config in {places}" if others else f"no checkpoint in {places}"
        for run, difference in others.items() if path is None else ():
            print(f"resume: {run} is another run ({difference})", file=sys.stderr)
        print(
            f"resume: {f'going on from {path}' if path else f'{nothing}, starting afresh'}", file=sys.stderr
        )
    if path is not None:
        _warn(compare(_saved(Path(path).parent), yaml.safe_load(config)).ranks)
    return path


def check_settings(path: str, config: str) -> None:
    """Refuses settings that a run resumed from `path` would not follow.

    Those of its run are in the config beside it; alone it still holds the arguments of model and data.

    Args:
        path: The checkpoint.
        config: The text of the command's `config.yaml`.

    Raises:
        ValueError: A setting differs; the message names it and both values.
    """
    given = yaml.safe_load(config)
    changes = compare(_saved(Path(path).parent) or _hyperparameters(path, given), given)
    if changes.refused:
        shown = "; ".join(map(str, changes.refused[:4]))
        raise ValueError(
            f"ckpt_path: {path!r} is of a run with {shown}: a resumed run would not follow that; leave it "
            "as it was, or start a new run with --model.init_from"
        )
    _warn(changes.method + changes.ranks)


def _is_of(run: Path, config: str, others: dict[str, str]) -> bool:
    """Returns whether a run's folder is of the config; notes in `others` why not."""
    changes = compare(_saved(run), yaml.safe_load(config))
    if different := changes.refused + changes.method:
        others[str(run)] = str(different[0])
    return not different


def _saved(folder: Path) -> dict[str, Any]:
    """Returns a run's config, or nothing where it has none that can be read."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _hyperparameters(path: str, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the command's config with the arguments of model and data that a checkpoint holds."""
    if not os.path.isfile(path):
        return {}
    checkpoint = read_file(path, "ckpt_path", mmap=True)
    saved = dict(given)
    for part, key in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
        arguments = (given.get(part) or {}).get("init_args") or {}
        own = {name: _listed(checkpoint.get(key, {}).get(name, value)) for name, value in arguments.items()}
        saved[part] = {**(given.get(part) or {}), "init_args": own}
    return saved


def _listed(value: object) -> object:
    """Returns a value as YAML knows it, which has no tuples."""
    if isinstance(value, dict):
        return {key: _listed(entry) for key, entry in value.items()}
    return [_listed(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _warn(changes: list[Change]) -> None:
    for change in changes:
        rank_zero_warn(
            f"resume: {change}: followed from here on, so the run ends elsewhere than an uninterrupted one"
        )


def keep_classes(config: Any) -> None:  # noqa: ANN401
    """Numbers the data's classes as the checkpoint's network does, by their names.

    A folder that has a class more or less would otherwise shift every label behind it.
    """
    path, data = config.get("ckpt_path"), config.get("data")
    arguments = None if data is None else data.get("init_args")
    if path is None or arguments is None or not os.path.isfile(str(path)):
        return
    if "classes" in arguments and arguments["classes"] is None:  # else the file need not be read
        arguments["classes"] = saved_class_names(read_file(str(path), "ckpt_path", mmap=True))


def check_file(path: str, command: str) -> None:
    """Refuses a file that the command cannot use, before anything is built.

    Raises:
        ValueError: The file is damaged, carries code, is not ours or holds too little; one line.
    """
    content: Any = read_file(path, "ckpt_path", mmap=True)
    check_training_file(content, path, "ckpt_path", resuming=command == "fit")
    del content
