"""Shorter ways to write arguments, put into the parser's own words before it sees them."""

from __future__ import annotations

from typing import Any

from lightning_n2uq.cli.configs import read_config

_NOTHING = ("null", "none", "None", "false", "False")
_LOGGERS = ("TensorBoardLogger", "CSVLogger")  # which the parser wants a folder for


def long_names(arguments: list[str]) -> list[str]:
    """Returns the arguments with `--ckpt` as `--ckpt_path` and `--checkpoint null` as what it means."""
    result: list[str] = []
    rest = iter(arguments)
    for text in rest:
        flag, equals, value = text.partition("=")
        if flag == "--ckpt":
            result.append(f"--ckpt_path{equals}{value}")
        elif flag == "--checkpoint":
            value = value if equals else next(rest, "")
            off = ["--trainer.enable_checkpointing", "false"]
            result += off if value in _NOTHING else [flag, value]
        else:
            result.append(text)
    return result


def spelled_out(arguments: list[str], paths: list[str]) -> list[str]:
    """Returns the arguments with what the parser does not know by itself.

    - `--trainer.strategy nuqsgd --trainer.strategy.bits 2`: the class behind the name, with its arguments.
    - `--trainer.logger TensorBoardLogger`: writes to the run's folder.

    Args:
        arguments: The command line.
        paths: Its configs, one of which may name the strategy.
    """
    return _with_folder(_with_class(arguments, paths))


def _with_class(arguments: list[str], paths: list[str]) -> list[str]:
    flag = "--trainer.strategy"
    extra = [
        text
        for text in arguments
        if text.startswith(f"{flag}.") and not text.startswith(f"{flag}.class_path")
    ]
    place, name = _value(arguments, flag)
    if not extra or (name := name or _in_configs(paths)) is None:
        return arguments
    found = _strategy(name)
    if found is None:
        return arguments
    kind, defaults = found
    given = {text.partition("=")[0].removeprefix(f"{flag}.").removeprefix("init_args.") for text in extra}
    chosen = [flag, kind]
    for key, value in defaults.items():
        if key not in given:
            chosen += [f"{flag}.{key}", str(value)]
    if place is None:
        place = (arguments.index(extra[0]), arguments.index(extra[0]))
    return [*arguments[: place[0]], *chosen, *arguments[place[1] :]]


def _strategy(name: str) -> tuple[str, dict[str, Any]] | None:
    """Returns the class and the arguments that a registered name of ours stands for."""
    from lightning_n2uq.compression import CODECS
    from lightning_n2uq.strategies.torch_hooks import HOOKS

    if name in CODECS:
        return "NUQSGDStrategy", dict(CODECS[name])
    hook = name.removeprefix("ddp_")
    return ("TorchHookStrategy", {"hook": hook}) if name != hook and hook in HOOKS else None


def _in_configs(paths: list[str]) -> str | None:
    name = None
    for path in paths:
        config = read_config(path)
        trainer = config.get("trainer") if isinstance(config, dict) else None
        strategy = trainer.get("strategy") if isinstance(trainer, dict) else None
        name = strategy if isinstance(strategy, str) else name
    return name


def _with_folder(arguments: list[str]) -> list[str]:
    flag = "--trainer.logger"
    place, name = _value(arguments, flag)
    has_folder = any(
        text.startswith((f"{flag}.save_dir", f"{flag}.init_args.save_dir")) for text in arguments
    )
    if place is None or name not in _LOGGERS or has_folder:
        return arguments
    return [*arguments[: place[1]], f"{flag}.save_dir", "runs", *arguments[place[1] :]]


def _value(arguments: list[str], flag: str) -> tuple[tuple[int, int] | None, str | None]:
    """Returns from where to where the last `flag` stands, and its value."""
    for start in range(len(arguments) - 1, -1, -1):
        name, equals, value = arguments[start].partition("=")
        if name == flag and equals:
            return (start, start + 1), value
        if name == flag and start + 1 < len(arguments):
            return (start, start + 2), arguments[start + 1]
    return None, None
