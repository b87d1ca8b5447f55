"""Classes of the user's own that a config names: found in the current folder, errors shown as they are."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_n2uq.cli.arguments import keys_and_values
from lightning_n2uq.cli.configs import read_config

_SECTIONS = ("model", "data")
_CALLBACKS = "trainer.callbacks"
_PACKAGED = {
    "model": "lightning_n2uq.modules",
    "data": "lightning_n2uq.datamodules",
    _CALLBACKS: "lightning_n2uq.callbacks",
}


def see_current_folder() -> None:
    """Lets Python import from the current folder, behind everything that is installed."""
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)


def check_importable(paths: Sequence[str], arguments: Sequence[str]) -> None:
    """Imports the modules of classes with a dotted path, before the parser turns an error into another one.

    Args:
        paths: Configs; addresses are left to the parser.
        arguments: The command line.

    Raises:
        ValueError: A module is not there, fails as it is imported, or lacks the class; one line.
    """
    named: dict[str, str] = {}
    callbacks: list[str] = []
    for path in paths:
        config = read_config(path)
        named |= dict(_in_config(config))
        callbacks += _callbacks_in_config(config)
    for key, value in keys_and_values(list(arguments)):
        section = key.removesuffix(".class_path")
        if value.startswith(("{", "[")):  # classes in JSON are the parser's
            continue
        if section in _SECTIONS:
            named[section] = value
        elif section == _CALLBACKS:
            callbacks.append(value)
    for key, name in (*named.items(), *((_CALLBACKS, name) for name in callbacks)):
        if "." in name:
            _check(key, name)


def class_of(path: str) -> type:
    """Returns the class that a dotted path names."""
    module, _, name = path.rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


def where(error: BaseException) -> str:
    """Returns `file:line in function` of the user's own code that raised an error, or an empty string."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _installed(frame.filename)]
    if not frames:
        return ""
    last = frames[-1]
    return f"{os.path.relpath(last.filename)}:{last.lineno} in {last.name}"


def own_error(error: BaseException) -> ValueError | None:
    """Returns one line for an error of the user's own code, which the parser may have wrapped; else None."""
    found = None
    seen: BaseException | None = error
    while seen is not None:
        if place := where(seen):
            found = f"{type(seen).__name__}: {' '.join(str(seen).split())} ({place})"
        seen = seen.__cause__
    return None if found is None else ValueError(f"{found}; --debug shows the traceback")


def _check(key: str, name: str) -> None:
    module, _, cls = name.rpartition(".")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            ours = ", ".join(importlib.import_module(_PACKAGED[key]).__all__)
            raise ValueError(
                f"{key}: got {name!r}, there is no module {error.name!r} in the current folder or installed; "
                f"allowed are importable classes and {ours}"
            ) from error
        raise _failed(key, module, error) from error
    except Exception as error:
        raise _failed(key, module, error) from error
    if not hasattr(found, cls):
        classes = [n for n, v in vars(found).items() if isinstance(v, type) and v.__module__ == module]
        raise ValueError(f"{key}: got {name!r}, allowed are {', '.join(classes) or 'none'} in {module}")


def _failed(key: str, module: str, error: Exception) -> ValueError:
    place = where(error)
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{os.path.relpath(error.filename)}:{error.lineno}"
    text = " ".join(str(error).split())
    return ValueError(
        f"{key}: cannot import {module!r} ({type(error).__name__}: {text}{f'; {place}' if place else ''})"
    )


def _in_config(config: Any) -> Iterator[tuple[str, str]]:  # noqa: ANN401
    for key in _SECTIONS:
        value = config.get(key) if isinstance(config, dict) else None
        if isinstance(value, dict):
            value = value.get("class_path")
        if isinstance(value, str):
            yield key, value


def _callbacks_in_config(config: Any) -> list[str]:  # noqa: ANN401
    trainer = config.get("trainer") if isinstance(config, dict) else None
    entries = trainer.get("callbacks") if isinstance(trainer, dict) else None
    listed = entries if isinstance(entries, list) else [entries]
    paths = [entry.get("class_path") if isinstance(entry, dict) else entry for entry in listed]
    return [path for path in paths if isinstance(path, str)]


def _installed(filename: str) -> bool:
    """Returns whether a file belongs to Python, to an installed package or to this one."""
    if filename.startswith("<") or not {"site-packages", "dist-packages"}.isdisjoint(Path(filename).parts):
        return True
    package = Path(__file__).parents[1]
    own = (package, package.parent / "callbacks", package.parent / "datamodules")
    roots = [sysconfig.get_path("stdlib"), *map(str, own)]
    return any(filename.startswith(f"{os.path.abspath(root)}{os.sep}") for root in roots)
