"""Several configs in one command: a later one overrides values, and must not drop whole parts in silence."""

from __future__ import annotations

import warnings
from typing import Any

from lightning_n2uq.cli.configs import read_config

_SECTIONS = {"trainer": (dict,), "model": (dict, str), "data": (dict, str)}
_LISTS = ("callbacks", "logger", "plugins")


def check_layers(paths: list[str]) -> None:
    """Refuses a config of another shape, and warns of a list that replaces an earlier config's.

    Args:
        paths: The configs in the order of the command; addresses are left to the parser.

    Raises:
        ValueError: A config, or its `trainer`, `model` or `data`, is no mapping; one line.
    """
    owners: dict[str, str] = {}
    for path in paths:
        config = read_config(path)
        _check_shape(config, path)
        trainer = (config or {}).get("trainer") or {}
        for name in _LISTS:
            if not trainer.get(name):
                continue
            if name in owners:
                warnings.warn(
                    f"trainer.{name}: those of {owners[name]!r} are dropped, since {path!r} has its own; "
                    f"it adds to them with `{name}+:`",
                    UserWarning,
                    stacklevel=2,
                )
            owners[name] = path


def _check_shape(config: Any, path: str) -> None:  # noqa: ANN401
    if config is None:
        return
    if not isinstance(config, dict):
        raise ValueError(f"config: {path!r} holds {_shown(config)}, allowed is a mapping of keys to values")
    for name, kinds in _SECTIONS.items():
        if name in config and not isinstance(config[name], kinds):
            allowed = (
                "a mapping" if str not in kinds else "a class, or a mapping with class_path or init_args"
            )
            raise ValueError(
                f"{name}: got {_shown(config[name])} in {path!r}, allowed is {allowed}; "
                "without the key an earlier config's stays"
            )


def _shown(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__} ({str(value)[:60]})"
