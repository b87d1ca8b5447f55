"""Mistakes in a command that are found before torch is imported, so that the answer takes no seconds.

Only what is certain is refused here; everything else is left to the parser. The messages are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_n2uq.cli import sources
from lightning_n2uq.cli.arguments import SPECIAL_CHECKPOINTS, resolve_arguments, with_saved_config
from lightning_n2uq.cli.checkpoint_path import checkpoint_file
from lightning_n2uq.cli.configs import check_arguments, check_config
from lightning_n2uq.cli.errors import TOP_KEYS, names_and_hint

_SECTIONS = ("model", "data")
_OF_CLASS = ("class_path", "init_args", "dict_kwargs", "help")
_SWITCHES = {"help", "print_config", "print_shtab"}
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
        config = {} if "://" in path else yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        given += _in_config(config) if isinstance(config, dict) else []
    given += _on_command_line(resolved)
    classes = _named_classes(given)
    for index, (key, value) in enumerate(given):
        later = (other for other, _ in given[index + 1 :])
        section = key.partition(".")[0]
        if not any(other in (section, f"{section}.class_path") for other in later):
            _check_key(key, value, classes)


def _check_checkpoint(command: str, arguments: list[str]) -> None:
    given = dict(_on_command_line(arguments))
    path = given.get("ckpt_path")
    if not isinstance(path, str) or path in (*SPECIAL_CHECKPOINTS, "null") or "://" in path:
        return
    if path.startswith("registry"):
        return
    checkpoint_file(path, "ckpt_path")
    has_config = {"config", "c", "model"} & {key.partition(".")[0] for key in given}
    if command != "fit" and not has_config and not (Path(path).parent / "config.yaml").is_file():
        raise ValueError(
            f"ckpt_path: {path!r} has no config.yaml beside it that says which model and data it is of; give "
            "--config (n2uq predict --images needs none)"
        )


def _on_command_line(arguments: list[str]) -> Iterator[Given]:
    rest = list(arguments)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("-") or not flag.strip("-"):
            continue
        key = flag.lstrip("-").removesuffix("+")
        if not equals and key.partition(".")[0] not in _SWITCHES and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        yield key, value


def _in_config(config: Mapping[str, Any]) -> Iterator[Given]:
    for name, section in config.items():
        key = str(name).removesuffix("+")
        yield key, section
        if isinstance(section, Mapping) and key in (*_SECTIONS, "trainer"):
            inner = section.get("init_args") if key in _SECTIONS else section
            yield from (
                (f"{key}.{option}", value) for option, value in section.items() if option == "class_path"
            )
            if isinstance(inner, Mapping):
                yield from (
                    (f"{key}.{str(option).removesuffix('+')}", value) for option, value in inner.items()
                )


def _named_classes(given: list[Given]) -> dict[str, sources.Class]:
    """Returns the packaged classes of model and data, as far as they are known for certain."""
    known, found = sources.our_classes(), {}
    for section in _SECTIONS:
        names = [str(value) for key, value in given if key in (section, f"{section}.class_path")]
        names = [name for name in names if not name.startswith(("{", "[")) and name != "None"]
        last = names[-1] if names else ""
        if last.startswith("lightning_n2uq."):
            last = last.rpartition(".")[2]
        if last in known and known[last].part == section and known[last].parameters is not None:
            found[section] = known[last]
    return found


def _check_key(key: str, value: object, classes: Mapping[str, sources.Class]) -> None:
    first, *rest = key.removeprefix("-").split(".")
    if first not in {*TOP_KEYS, *_LIGHTNINGS, *_SWITCHES, "c", "h"}:
        raise ValueError(f"{key}: unknown key; {names_and_hint(list(TOP_KEYS), first)}")
    if rest[:1] == ["init_args"]:
        rest = rest[1:]
    if not rest or rest[0] in _OF_CLASS:
        return
    if first == "trainer" and (trainer := sources.trainer()) and trainer.parameters:
        names = [parameter.name for parameter in trainer.parameters]
        if rest[0] not in names:
            raise ValueError(f"{key}: unknown key; {names_and_hint(names, rest[0])}")
    if first in classes:
        parameters = classes[first].parameters or ()
        names = [parameter.name for parameter in parameters]
        if rest[0] not in names:
            raise ValueError(
                f"{first}.{rest[0]}: got {value!r}, unknown key of {classes[first].name}; "
                f"{names_and_hint(names, rest[0])}"
            )
