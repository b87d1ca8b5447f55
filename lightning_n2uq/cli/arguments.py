"""Command-line arguments before they are parsed: names of configs, a config left out, the way to resume."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from lightning_n2uq.cli.configs import find_config

SPECIAL_CHECKPOINTS = ("best", "last", "hpc")  # what Lightning finds by itself
_CONFIG = ("--config", "-c")
_RESUME = ("--resume", "--ckpt_path")
SWITCHES = ("help", "print_config", "print_shtab")
"""Options without a value."""


def resolve_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Replaces names of configs by paths; returns the arguments and the paths."""
    resolved: list[str] = []
    paths: list[str] = []
    for flag, value, texts in _options(arguments):
        if flag in _CONFIG and value is not None:
            paths.append(find_config(value))
            resolved += [flag, paths[-1]] if len(texts) == 2 else [f"{flag}={paths[-1]}"]
        else:
            resolved += texts
    return resolved, paths


def with_saved_config(arguments: list[str]) -> list[str]:
    """Uses the config that was saved beside the checkpoint where neither a config nor a model is given."""
    options = [(flag, value) for flag, value, _ in _options(arguments)]
    if any(flag in _CONFIG or flag.partition(".")[0] == "--model" for flag, _ in options):
        return arguments
    for flag, value in options:
        if flag == "--ckpt_path" and value is not None and value not in SPECIAL_CHECKPOINTS:
            saved = Path(value).parent / "config.yaml"
            if saved.is_file():
                return ["--config", str(saved), *arguments]
    return arguments


def command_to_resume(arguments: list[str]) -> str:
    """Returns the command line that goes on with the run started by `n2uq fit ARGUMENTS`."""
    return f"go on with: n2uq fit {shlex.join([*without_checkpoint(arguments), '--resume', 'auto'])}"


def without_checkpoint(arguments: list[str]) -> list[str]:
    """Returns the arguments of a run that starts anew."""
    return [text for flag, _, texts in _options(arguments) if flag not in _RESUME for text in texts]


def keys_and_values(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Yields what each flag sets, `--trainer.callbacks+=NAME` as `("trainer.callbacks", "NAME")`.

    A text behind a flag is its value unless it is a flag itself; switches have none.
    """
    rest = list(arguments)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("-") or not flag.strip("-"):
            continue
        key = flag.lstrip("-").removesuffix("+")
        if not equals and key.partition(".")[0] not in SWITCHES and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        yield key, value


def _options(arguments: list[str]) -> Iterator[tuple[str, str | None, list[str]]]:
    """Flag, value and the texts they were written as; flags unknown here have no value of their own."""
    rest = iter(arguments)
    for text in rest:
        flag, equals, value = text.partition("=")
        following = None if equals or flag not in (*_CONFIG, *_RESUME) else next(rest, None)
        yield flag, value if equals else following, [text] if following is None else [text, following]
