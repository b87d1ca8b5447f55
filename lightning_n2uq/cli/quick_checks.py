"""Mistakes in a command that are found before torch is imported, so that the answer takes no seconds.

Only what is certain is refused here; everything else is left to the parser. The messages are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_n2uq.cli import sources
from lightning_n2uq.cli.arguments import SWITCHES, keys_and_values, resolve_arguments, with_saved_config
from lightning_n2uq.cli.checkpoint_path import checkpoint_file, is_file_name
from lightning_n2uq.cli.configs import check_arguments, check_config, read_config
from lightning_n2uq.cli.errors import TOP_KEYS, names_and_hint

_SECTIONS = ("model", "data")
_OF_CLASS = ("class_path", "init_args", "dict_kwargs", "help")
_LIGHTNINGS = {
    "optimizer", "lr_scheduler", "ckpt_path", "weights_only", "verbose", "return_predictions", "dataloaders",
    "train_dataloaders", "val_dataloaders", "datamodule",
}  # fmt: skip
Given = tuple[str, object]
"""A dotted key and its value."""


def check(command: str, arguments: list[str]) -> None:
    """Refuses what the command cannot mean.

    Args:
        command: A sub-command of the Trainer.
        arguments: Those behind it, `--ckpt_path` spelled out.

    Raises:
        ValueError: A file is not there, or a key is unknown; one line.
    """
    check_arguments(arguments)
    _check_checkpoint(command, arguments)
    resolved, paths = resolve_arguments(with_saved_config(arguments))
    given: list[Given] = []
    for path in paths:
        check_config(path)
        config = read_config(path)
        given += _in_config(config) if isinstance(config, dict) else []
    given += keys_and_values(resolved)
    unread = any("://" in path for path in paths)
    classes = {} if unread else _named_classes(given)
    for place, (key, value) in enumerate(given):
        _check_key(key)
        begin, cls = classes.get(key.partition(".")[0], (place, None))
        if cls is not None and place > begin:  # an earlier class may have had the key
            _check_argument(key, value, cls)


def _check_checkpoint(command: str, arguments: list[str]) -> None:
    given = dict(keys_and_values(arguments))
    path = given.get("ckpt_path")
    if path is None or not is_file_name(path):
        return
    checkpoint_file(path, "ckpt_path")
    has_config = {"config", "c", "model"} & {key.partition(".")[0] for key in given}
    if command != "fit" and not has_config and not (Path(path).parent / "config.yaml").is_file():
        alone = " (or --images, for which the checkpoint is enough)" if command == "predict" else ""
        raise ValueError(
            f"ckpt_path: {path!r} has no config.yaml beside it that says which model and data it is of; give "
            f"--config{alone}"
        )


def _in_config(config: Mapping[str, Any]) -> Iterator[Given]:
    for name, section in config.items():
        key = str(name).removesuffix("+")
        yield key, section
        if isinstance(section, Mapping) and key in (*_SECTIONS, "trainer"):
            inner = section if key == "trainer" else section.get("init_args")
            if key in _SECTIONS and "class_path" in section:
                yield f"{key}.class_path", section["class_path"]
            for option, value in inner.items() if isinstance(inner, Mapping) else ():
                yield f"{key}.{str(option).removesuffix('+')}", value


def _named_classes(given: list[Given]) -> dict[str, tuple[int, sources.Class]]:
    """Returns the packaged classes of model and data, as far as they are known for certain, and their places.

    The last name counts. A mapping is no name: its `class_path` comes behind it, if it has one; what is
    written as JSON names an unknown class.
    """
    known = sources.our_classes()
    found: dict[str, tuple[int, sources.Class]] = {}
    for section in _SECTIONS:
        for place, (key, value) in enumerate(given):
            if key not in (section, f"{section}.class_path") or not isinstance(value, str):
                continue
            found.pop(section, None)
            cls = known.get(value.rpartition(".")[2] if value.startswith("lightning_n2uq.") else value)
            if cls is not None and cls.part == section and cls.parameters is not None:
                found[section] = (place, cls)
    return found


def _check_key(key: str) -> None:
    first, *rest = key.split(".")
    if first not in {*TOP_KEYS, *_LIGHTNINGS, *SWITCHES, "c", "h"}:
        raise ValueError(f"{key}: unknown key; {names_and_hint(list(TOP_KEYS), first)}")
    if first == "trainer" and rest and (trainer := sources.trainer()) and trainer.parameters:
        names = [parameter.name for parameter in trainer.parameters]
        if rest[0] not in names:
            raise ValueError(f"{key}: unknown key; {names_and_hint(names, rest[0])}")


def _check_argument(key: str, value: object, cls: sources.Class) -> None:
    section, *rest = key.split(".")
    rest = rest[1:] if rest[:1] == ["init_args"] else rest
    names = [parameter.name for parameter in cls.parameters or ()]
    if rest and rest[0] not in (*_OF_CLASS, *names):
        hint = names_and_hint(names, rest[0])
        raise ValueError(f"{section}.{rest[0]}: got {value!r}, unknown key of {cls.name}; {hint}")
