"""Turns an exception into one line that names the key, the value and what is allowed.

Constructors of this package already raise such lines. The parser (jsonargparse) reports trees of attempts
instead; their leaves are found here by the parser's fixed phrases. An unknown phrase is shown as it is,
on one line.
"""

import argparse
import ast
import difflib
import importlib
import inspect
import os
import pickle
import re
import traceback
from typing import Any

from lightning_n2uq.cli.origin import without_worker_traceback

_MAX_LENGTH = 600
# Where classes that a config can name live; the command line's own are left out.
_NAMED_FROM = (
    "lightning_n2uq.modules",
    "lightning_n2uq.datamodules",
    "lightning_n2uq.callbacks",
    "lightning_n2uq.strategies",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
)
_REMOVED = {("coding", "ans"): "; ans was removed because huffman is faster in every measurement"}
TOP_KEYS = (
    "config", "seed_everything", "trainer", "model", "data", "ckpt_path", "resume", "test_after_fit",
    "checkpoint", "lr_monitor", "progress_bar", "guard", "non_finite_guard", "wandb",
)  # fmt: skip
"""What stands in front of the first dot of an option."""
_TYPE_NAMES = {"NoneType": "null", "dict": "a mapping", "list": "a list"}


def is_user_error(error: BaseException) -> bool:
    """Returns whether the error is a mistake in the command, the config or a file, not in the code."""
    if isinstance(error, pickle.UnpicklingError):  # a checkpoint with more than tensors and plain values
        return _raised_by_torch_load(error)
    if isinstance(error, RuntimeError) and "Error(s) in loading state_dict" in str(error):
        return True
    if is_out_of_memory(error):
        return True
    names = {cls.__name__ for cls in type(error).__mro__}  # by name: lightning may not be imported yet
    return isinstance(error, (ValueError, argparse.ArgumentError, OSError)) or not names.isdisjoint(
        {"MisconfigurationException", "NonFiniteError", "IncompatibleReleaseError", "RankFailureError"}
    )


def _raised_by_torch_load(error: BaseException) -> bool:
    """Returns whether a checkpoint was read: caches of other packages are pickled, too."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(file.endswith(os.path.join("torch", "serialization.py")) for file in files)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether memory of a device or of the machine ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    phrases = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)


def one_line(error: BaseException) -> str:
    """Returns the message to show for an error of the user's."""
    text = error.message if isinstance(error, argparse.ArgumentError) else without_worker_traceback(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    if isinstance(error, pickle.UnpicklingError):
        text = (
            f"ckpt_path: refused, the file holds more than tensors and plain values ({_shorten(text, 200)})"
        )
    if is_out_of_memory(error):
        return _shorten(f"out of memory; a smaller data.batch_size needs less ({_shorten(text, 200)})")
    if "Error(s) in loading state_dict" in text:
        text = "ckpt_path: the checkpoint does not fit this model (other backbone, bits or method?): " + text
    for rule in (
        _wrong_strategy,
        _missing_argument,
        _unknown_option,
        _wrong_class,
        _wrong_value,
        _own_error,
        _required,
        _unknown_key,
    ):
        if line := rule(text):
            return _shorten(line)
    return _shorten(text)


def _shorten(text: str, length: int = _MAX_LENGTH) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 4] + " ..."


def _key(text: str) -> str:
    return ".".join(re.findall(r'Parser key "([^"]+)"', text)[:2])


def _given(text: str) -> Any:  # noqa: ANN401
    """Returns the value that the parser shows, as an object where it is a literal."""
    found = re.search(r"Given value: (.*)", text, re.DOTALL)
    value = found.group(1).strip() if found else ""
    if nested := re.match(r"NestedArg\(key='([^']*)', val='?(.*?)'?\)$", value):
        return {nested.group(1): nested.group(2)}
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _find(tree: Any, key: str) -> str:  # noqa: ANN401
    """Returns `got <value>` of the first entry called `key` in nested dictionaries and lists, or nothing."""
    if isinstance(tree, str):  # beside classes that the parser has found already, it shows no literal
        shown = re.search(rf"'{re.escape(key)}': ('[^']*'|[^,}}\])]+)", tree)
        return f"got {shown.group(1)}, " if shown else ""
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    if isinstance(tree, dict) and key in tree:
        return f"got {tree[key]!r}, "
    return next((found for child in children if (found := _find(child, key))), "")


def names_and_hint(names: list[str], wrong: str) -> str:
    """Returns what is allowed, and the name that was probably meant."""
    close = difflib.get_close_matches(wrong, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed are {', '.join(names)}"


def _unknown_option(text: str) -> str | None:
    """Explains a key that the class does not take."""
    found = re.search(r"Problem with given class_path '([^']+)':\s*Option '([^']+)' is not accepted", text)
    if not found:
        return None
    path, option = found.groups()
    module, _, name = path.rpartition(".")
    signature = inspect.signature(getattr(importlib.import_module(module), name))
    keys = [key for key, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD]
    hint = names_and_hint(keys, option)
    return f"{_key(text)}.{option}: {_find(_given(text), option)}unknown key of {name}; {hint}"


def _wrong_strategy(text: str) -> str | None:
    """Explains the name of a strategy that is not registered; Lightning names a few of its own."""
    found = re.search(r"invalid strategy name: `strategy='?([^'`]*)'?`", text)
    if not found:
        return None
    from lightning.pytorch.strategies import StrategyRegistry

    wrong = found.group(1)
    ours = [name for name in StrategyRegistry if _strategy_is_ours(StrategyRegistry[name])]
    others = [name for name in StrategyRegistry if name not in ours]
    hint = names_and_hint([*ours, "auto", "ddp", "fsdp"], wrong)
    return f"trainer.strategy: got {wrong!r}, {hint} (and Lightning's {', '.join(others[:40])})"


def _strategy_is_ours(entry: Any) -> bool:  # noqa: ANN401  # a dictionary of the registry
    return str(getattr(entry.get("strategy"), "__module__", "")).startswith("lightning_n2uq.")


def _missing_argument(text: str) -> str | None:
    """Explains a class that lacks an argument, which the parser names, or shows as one that is None."""
    named = re.search(
        r"Problem with given class_path '([\w.]+)':\s*the following arguments are required: (\w+)", text
    )
    if named:
        name = named.group(1).rpartition(".")[2]
        return f"{_key(text)}.{named.group(2)}: missing, {name} has no default for it"
    found = re.search(
        r"Given value: \"?Namespace\(class_path='([\w.]+)', init_args=Namespace\((.*)\)\)", text, re.DOTALL
    )
    if not found:
        return None
    module, _, name = found.group(1).rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    missing = [n for n in needed if re.search(rf"\b{n}=None\b", found.group(2))]
    if not missing:
        return None
    return f"{_key(text)}.{missing[0]}: missing, {name} has no default for it"


def _wrong_class(text: str) -> str | None:
    """Explains a class name that nobody knows, or a class of another kind."""
    found = re.search(r"Expected a dot import path string: (\S+)|Expected a path but (\S+) either not", text)
    if not found:
        found = re.search(r"Given value: '?\"?([\w.]+)", text) if "Not a valid subclass of" in text else None
    if not found:
        return None
    given = _given(text)
    key, wrong = _key(text), str(given)
    if isinstance(given, dict) and "class_path" in given:
        wrong = given["class_path"]
    names = _class_names(text)
    return f"{key}: got {wrong!r}, {names_and_hint(names, wrong)} (or the import path of another class)"


def _class_names(text: str) -> list[str]:
    """Returns the short names of imported classes of the wanted kind: ours first, then Lightning's."""
    names: dict[str, None] = {}
    for path in re.findall(r"<class '([\w.]+)'>", text.partition("Errors:")[0]):
        module, _, name = path.rpartition(".")
        if module and not module.startswith("jsonargparse"):
            names.update(dict.fromkeys(_subclasses(getattr(importlib.import_module(module), name))))
    return list(names)


def _subclasses(base: type) -> list[str]:
    found: set[tuple[bool, str]] = set()
    stack: list[type] = [base]
    while stack:
        children: list[type] = stack.pop().__subclasses__()
        for cls in children:
            stack.append(cls)
            if cls.__module__.startswith(_NAMED_FROM) and not inspect.isabstract(cls):
                found.add((not cls.__module__.startswith("lightning_n2uq."), cls.__name__))
    return [name for _, name in sorted(found) if not name.startswith("_")]


def _wrong_value(text: str) -> str | None:
    """Explains a value of another type, or not among the choices."""
    expected = re.findall(r"Expected an? (.+?)(?:\. Got value: (.*))?$", text, re.MULTILINE)
    key = _key(text)
    if not expected or not key:
        return None
    leaf = [(kind, got) for kind, got in expected if got] or expected
    got = leaf[0][1] or _given(text)
    kinds = dict.fromkeys(_type_name(kind) for kind, _ in leaf)
    if _constructor_lines(text):
        return None
    removed = _REMOVED.get((key.rpartition(".")[2], str(got).strip("'")), "")
    allowed = " or ".join(kinds)
    return f"{key}: got {got!r}, allowed {'are' if ',' in allowed else 'is'} {allowed}{removed}"


def _type_name(kind: str) -> str:
    if choices := re.match(r"(?:typing\.)?Literal\[(.*)\]", kind):
        return choices.group(1).replace("'", "")
    name = kind.removeprefix("<class '").removesuffix("'>")
    return _TYPE_NAMES.get(name, name)


def _constructor_lines(text: str) -> list[str]:
    """Returns the attempts in the parser's tree that failed with an error of the class itself."""
    tree = text.partition("Errors:\n")[2].partition("Given value type:")[0]
    attempts = re.split(r"\n\s*- ", "\n" + tree)
    # The last two: what the parser lists below "Not a valid subclass", for a class that it did find.
    skipped = (
        "Expected a", "Not a valid subclass", "Problem with given class_path", "a class path", "a dict with",
    )  # fmt: skip
    return [line for line in map(str.strip, attempts) if line and not line.startswith(skipped)]


def _own_error(text: str) -> str | None:
    lines = _constructor_lines(text)
    return _shorten(lines[0]) if lines else None


def _required(text: str) -> str | None:
    found = re.search(r"following arguments are required: (.+)", text)
    if not found:
        return None
    keys = ", ".join(key.strip().split(".", 1)[-1] for key in found.group(1).split(","))
    return f"{keys}: missing, give it in a config (--config, see `n2uq configs`) or on the command line"


def _unknown_key(text: str) -> str | None:
    found = re.search(
        r"Subcommand '\w+' does not accept option '([^']+)'|unrecognized arguments: --?([\w.]+)", text
    )
    if not found:
        return None
    key = found.group(1) or found.group(2)
    names = list(TOP_KEYS)
    wrong = key.partition(".")[0]
    if key.startswith("trainer."):
        from lightning.pytorch import Trainer

        names = list(inspect.signature(Trainer).parameters)
        wrong = key.removeprefix("trainer.")
    return f"{key}: unknown key; {names_and_hint(names, wrong)}"
