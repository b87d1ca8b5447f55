"""Classes that a config can name, read from their source: importing them takes seconds."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PACKAGE = "lightning_n2uq"
PARTS = {
    "model": ("modules", "modules/tasks"),
    "data": ("datamodules",),
    "trainer.callbacks": ("callbacks",),
    "trainer.strategy": ("strategies",),
}
"""What a config calls classes of each kind, and the folders that they lie in."""


@dataclass(frozen=True)
class Parameter:
    """One argument of a constructor, as it is written: name, type and default (empty where it has none)."""

    name: str
    kind: str
    default: str


@dataclass(frozen=True)
class Class:
    """A class with its documentation and its constructor's arguments.

    Attributes:
        name: Its name.
        part: A key of `PARTS`, or `trainer`.
        doc: Its docstring.
        parameters: The arguments; None where it inherits its constructor or takes any keyword.
    """

    name: str
    part: str
    doc: str
    parameters: tuple[Parameter, ...] | None


def folder_of(package: str) -> Path | None:
    """Returns the folder of an installed package or of a package in it; only the outer one is imported."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


@cache
def our_classes() -> dict[str, Class]:
    """Returns the public classes of this package that a config can name, by name."""
    found: dict[str, Class] = {}
    for part, places in PARTS.items():
        for place in places:
            first, *inner = place.split("/")
            folder = folder_of(f"{_PACKAGE}.{first}")
            if folder is None:
                continue
            folder = folder.joinpath(*inner)
            public = public_names(folder / "__init__.py")
            for path in sorted(folder.glob("*.py")):
                names = {c.name: c for c in _classes(path, part) if c.name in public}
                found.update({name: c for name, c in names.items() if not name.endswith("Error")})
    return found


@cache
def trainer() -> Class | None:
    """Returns Lightning's Trainer."""
    folder = folder_of("lightning")
    path = None if folder is None else folder / "pytorch" / "trainer" / "trainer.py"
    if path is None or not path.is_file():
        return None
    return next((c for c in _classes(path, "trainer") if c.name == "Trainer"), None)


def public_names(path: Path) -> set[str]:
    """Returns what `__all__` of a source file lists."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return {str(name) for name in ast.literal_eval(node.value)}
    return set()


def _classes(path: Path, part: str) -> Iterator[Class]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            methods = (m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == "__init__")
            init = next(methods, None)
            doc = ast.get_docstring(node) or (ast.get_docstring(init) if init else "") or ""
            yield Class(node.name, part, doc, None if init is None else _parameters(init.args))


def _parameters(arguments: ast.arguments) -> tuple[Parameter, ...] | None:
    if arguments.kwarg is not None:
        return None
    plain = arguments.args[1:]
    missing = len(plain) - len(arguments.defaults)
    defaults: list[ast.expr | None] = [*([None] * missing), *arguments.defaults]
    pairs = [
        *zip(plain, defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    return tuple(
        Parameter(
            argument.arg,
            "" if argument.annotation is None else ast.unparse(argument.annotation),
            "" if default is None else ast.unparse(default),
        )
        for argument, default in pairs
    )
