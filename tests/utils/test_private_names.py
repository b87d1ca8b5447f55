"""Private names of other packages are used in `utils/compat.py` and its two neighbours only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for part in ("lightning_n2uq", "callbacks", "datamodules") for path in (ROOT / part).rglob("*.py")
)
COMPAT = [
    ROOT / "lightning_n2uq" / "utils" / f"{name}.py" for name in ("compat", "compat_lightning", "compat_fsdp")
]
PUBLIC = {"_replace", "_asdict", "_fields", "_exit"}  # of named tuples, and of os
# Methods that a subclass overrides to take part, which their own documentation asks for.
OVERRIDDEN = {"_load_from_state_dict", "_save_to_state_dict"}


def _private(name):
    return name.startswith("_") and not name.endswith("__")


def _own_names(trees):
    """Private names that this package itself gives to functions, attributes, variables, modules."""
    found = {path.stem for path in FILES} | {path.parent.name for path in FILES}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("self", "cls")
            ):
                found.add(node.attr)
    return found


def _required(tree):
    """Names that a file asks `compat.require` for: methods of a base class that it overrides."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("require", "compat.require"):
            yield from (argument.value for argument in node.args[1:] if isinstance(argument, ast.Constant))


def _used(tree):
    """Private names that a file imports, reads or sets, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _private(node.attr):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, part) for part in parts if _private(part))
        elif isinstance(node, ast.Import):
            parts = [part for alias in node.names for part in alias.name.split(".")]
            yield from ((node.lineno, part) for part in parts if _private(part))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if isinstance(name, str) and _private(name):
                yield node.lineno, name


def _foreign(sources):
    trees = {path: ast.parse(text) for path, text in sources.items()}
    own = _own_names(trees.values()) | PUBLIC | OVERRIDDEN
    return [
        f"{path}:{line}: {name}"
        for path, tree in trees.items()
        for line, name in _used(tree)
        if name not in own | set(_required(tree))
    ]


@pytest.mark.integration
def test_private_names_of_other_packages_are_in_compat_only():
    assert _foreign({path: path.read_text() for path in FILES if path not in COMPAT}) == []


@pytest.mark.parametrize(
    "line",
    [
        "trainer._logger_connector.metrics",
        "from torch._C import something",
        "import torch._dynamo",
        "from lightning.fabric import _loops",
        "getattr(module, '_call_impl')",
        "module._compiled_call_impl = None",
    ],
)
def test_the_check_sees_them(line):
    assert len(_foreign({"file.py": line})) == 1


def test_overridden_methods_are_those_of_the_base_class():
    """An override of a method that a new release has renamed would silently never be called."""
    from torch import nn

    import lightning_n2uq.cli.training
    import lightning_n2uq.strategies.base
    import lightning_n2uq.strategies.sharded  # noqa: F401  # each asks for the names that it overrides

    assert all(hasattr(nn.Module, name) for name in OVERRIDDEN)
