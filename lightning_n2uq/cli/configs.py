"""Finds configs: files of the user first, then those that come with the package."""

import difflib
import importlib
import itertools
import os
import textwrap
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

NAME_HEADER = "# name: "
_PURPOSE = 100  # characters of `n2uq configs` for what a config is for
MAX_BYTES, MAX_ENTRIES, MAX_DEPTH = 2**20, 100_000, 100  # of a config; the largest shipped has 66 entries


def packaged_configs() -> dict[str, Path]:
    """Returns the packaged configs by name, for example `digits/n2uq_w2a2`."""
    root = Path(importlib.import_module("lightning_n2uq.configs").__path__[0])
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find_config(name: str) -> str:
    """Returns the path of the config called `name`: an existing file or URL as it is, else the packaged one.

    `digits/n2uq_w2a2`, `digits/n2uq_w2a2.yaml` and `configs/digits/n2uq_w2a2.yaml` all name the same
    packaged file.

    Raises:
        ValueError: There is no such file and no such packaged config.
    """
    if "://" in name or Path(name).is_file():
        return name
    packaged = packaged_configs()
    key = name.removeprefix("./").removeprefix("configs/").removesuffix(".yaml")
    if key in packaged:
        return str(packaged[key])
    close = difflib.get_close_matches(key, packaged, n=3, cutoff=0.3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(
        f"config: got {name!r}, allowed are existing files and packaged configs; {hint}"
        f"`n2uq configs` lists all {len(packaged)}"
    )


def read_config(path: str) -> Any:  # noqa: ANN401  # whatever the file holds
    """Returns what a config holds, in plain values; None for an address, which the parser reads."""
    return None if "://" in path else yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def check_config(path: str) -> None:
    """Refuses a file that unfolds into more than anything here needs, before the parser unfolds it.

    Aliases let a file of a few lines stand for billions of entries, or hold itself.

    Raises:
        ValueError: It is too large, too deep, no text, or no YAML; one line.
    """
    if "://" in path:
        return
    size = os.path.getsize(path)
    if size > MAX_BYTES:
        raise ValueError(f"config: {path!r} has {size} bytes, allowed are {MAX_BYTES}")
    try:
        _check_entries(Path(path).read_text(encoding="utf-8"), f"config: {path!r}")
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"config: cannot read {path!r} as YAML ({reason})") from error


def check_arguments(arguments: list[str]) -> None:
    """Refuses arguments whose value unfolds into more than anything here needs: the parser reads YAML there.

    Raises:
        ValueError: An argument is too large or holds itself; one line.
    """
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        name = flag if equals and flag.startswith("--") else "argument"
        for text in {argument, value}:
            if "*" not in text or "&" not in text:  # no alias, no unfolding
                continue
            try:
                _check_entries(text, f"{name}: {text[:60]!r}")
            except yaml.YAMLError:  # a glob, a query: a plain string to the parser, too
                continue
            except RecursionError as error:
                raise ValueError(f"{name}: {text[:60]!r} is {error}") from error


def _check_entries(text: str, name: str) -> None:
    root = yaml.compose(text, yaml.SafeLoader)
    entries = 0 if root is None else _unfolded(root, {}, 0)
    if entries > MAX_ENTRIES:
        raise ValueError(f"{name} unfolds to {entries} entries, allowed are {MAX_ENTRIES}")


def _unfolded(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Returns the number of entries below a node, aliases counted as often as they are used."""
    if depth > MAX_DEPTH:
        raise RecursionError(f"nested more than {MAX_DEPTH} deep, or holds itself")
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = [part if isinstance(part, tuple) else (part,) for part in parts]
        known[id(node)] = 1 + sum(_unfolded(child, known, depth + 1) for pair in pairs for child in pair)
    return known[id(node)]


def run_name(paths: list[str]) -> str:
    """Returns the name of a run's folder: `digits/n2uq_w2a2`, further configs appended with `+`."""
    names = [_checked(_name(path), path) for path in paths]
    return "+".join(names[:1] + [name.rpartition("/")[2] for name in names[1:]]) or "default"


def _checked(name: str, path: str) -> str:
    """Returns the name if a folder of that name lies below the runs, wherever the config is from."""
    parts = PurePosixPath(name).parts
    if not parts or name[0] in "/~" or ".." in parts or "\\" in name or not name.isprintable():
        raise ValueError(
            f"config: {path!r} names its run {name[:100]!r}, allowed is a relative path without '..'"
        )
    return name


def _name(path: str) -> str:
    file = Path(path)
    if file.is_file():
        first = file.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        if first.startswith(NAME_HEADER):  # a config saved by a run keeps that run's name
            return first.removeprefix(NAME_HEADER).strip()
    parts = file.with_suffix("").parts
    inside = parts[len(parts) - parts[::-1].index("configs") :] if "configs" in parts else parts[-1:]
    return "/".join(inside)


def list_configs(arguments: list[str]) -> int:
    """`n2uq configs [TEXT ...]`: prints packaged configs (that contain the texts), and what each is for."""
    if any(text in ("-h", "--help") for text in arguments):
        print(list_configs.__doc__)
        return 0
    found = {
        name: path for name, path in packaged_configs().items() if all(text in name for text in arguments)
    }
    if not found:
        raise ValueError(
            f"configs: got {' '.join(arguments)!r}, which no name contains; without it all are listed"
        )
    width = max(map(len, found))
    for name, path in found.items():
        print(f"{name:<{width}}  {purpose(path)}")
    return 0


def purpose(path: Path) -> str:
    """Returns the beginning of the comment on top of a config."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("# "), lines)
    text = " ".join(line.removeprefix("# ") for line in comment if not line.startswith("#  "))
    return textwrap.shorten(text, _PURPOSE, placeholder=" ...")
