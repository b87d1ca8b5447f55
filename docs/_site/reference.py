"""The reference, generated: every command, packaged config, config key and public name."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import griffe

from lightning_n2uq.cli.configs import find_config, purpose
from lightning_n2uq.cli.sources import public_names

PACKAGES = {
    "quantize": "One call",
    "modules": "Modules",
    "callbacks": "Callbacks",
    "datamodules": "Data modules",
    "strategies": "Strategies",
    "quantizers": "Quantizers",
    "layers": "Layers",
    "backbones": "Backbones",
    "convert": "Converting networks",
    "export": "Export",
    "compression": "Gradient codecs",
    "distributed": "Gradient exchange",
    "ops": "Operators",
    "interop": "Published checkpoints",
    "checkpointing": "Checkpoints",
    "report": "Report page",
    "dashboard": "Dashboard",
}
"""Packages with public names, in a user's order; `quantize` is the name in the package itself."""

CONFIGURED = ("modules", "datamodules", "callbacks", "strategies")
"""Packages whose classes are named in a config as `class_path`, their arguments as `init_args`."""


def pages(sources: Path) -> dict[str, str]:
    """Returns the text of every generated page by its path."""
    package = griffe.load(
        "lightning_n2uq",
        search_paths=[sources],
        docstring_parser="google",
        try_relative_path=False,
        resolve_aliases=True,
    )
    made = {f"reference/{name}.md": _python(name, title, sources) for name, title in PACKAGES.items()}
    return {
        **made,
        "reference/commands.md": _commands(),
        "reference/configs.md": _configs(sources),
        "reference/config_keys.md": _config_keys(package, sources),
    }


def _public(name: str, sources: Path) -> list[str]:
    return sorted(public_names(sources / "lightning_n2uq" / name / "__init__.py"))


def _python(name: str, title: str, sources: Path) -> str:
    if name == "quantize":
        return f"# {title}\n\n::: lightning_n2uq.convert.record.quantize\n"
    body = "\n".join(f"::: lightning_n2uq.{name}.{public}\n" for public in _public(name, sources))
    return f"# {title}: `lightning_n2uq.{name}`\n\n{body}"


def _commands() -> str:
    from lightning_n2uq.cli import main
    from lightning_n2uq.cli.commands import COMMANDS, TRAINING_COMMANDS, usage

    parts = ["# Commands", f"```text\n{usage()}\n```"]
    parts += [
        "The keys of `fit`, `validate`, `test` and `predict` are among the [config keys](config_keys.md)."
    ]
    for name in COMMANDS:
        if name in TRAINING_COMMANDS or name == "configs":
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            main([name, "--help"])
        parts += [f"## n2uq {name}", f"```text\n{out.getvalue().strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _configs(sources: Path) -> str:
    root = sources / "lightning_n2uq" / "configs"
    paths = sorted(root.rglob("*.yaml"))
    rows = [f"| `{path.relative_to(root).as_posix()}` | {_cell(purpose(path))} |" for path in paths]
    head = "# Packaged configs\n\n`n2uq fit --config NAME` takes each of these names.\n\n"
    return head + "| name | what it trains |\n|---|---|\n" + "\n".join(rows) + "\n"


def _config_keys(package: griffe.Object, sources: Path) -> str:
    parts = [
        "# Config keys",
        "Every key of a config is a flag of the command line as well: `--model.init_args.lr 0.01`, or "
        "shorter `--model.lr 0.01`. Classes are named by `class_path`, their keys stand under `init_args`.",
    ]
    for name in CONFIGURED:
        parts.append(f"## {PACKAGES[name]}")
        for public in _public(name, sources):
            found = package[f"{name}.{public}"]
            found = found.final_target if found.is_alias else found
            if found.is_class and (rows := _arguments(found)):
                parts += [f"### {public}", _TABLE + "\n".join(rows)]
    return "\n\n".join([*parts, *_parser_keys()]) + "\n"


_TABLE = "| key | type | default | meaning |\n|---|---|---|---|\n"


def _arguments(kind: Any) -> list[str]:  # noqa: ANN401 -- griffe's class
    init = next((base["__init__"] for base in (kind, *kind.mro()) if "__init__" in base.members), None)
    if init is None:
        return []
    words = _described(kind)
    return [
        f"| `{p.name}` | {_code(p.annotation)} | {_code(p.default)} | {_cell(words.get(p.name, ''))} |"
        for p in init.parameters
        if p.name != "self" and not p.name.startswith("*") and "var" not in str(p.kind)
    ]


def _described(kind: Any) -> dict[str, str]:  # noqa: ANN401 -- griffe's class
    words: dict[str, str] = {}
    for base in (*reversed(kind.mro()), kind):
        for section in base.docstring.parsed if base.docstring else []:
            if section.kind is griffe.DocstringSectionKind.parameters:
                words |= {argument.name: argument.description for argument in section.value}
    return words


def _parser_keys() -> list[str]:
    """Returns the tables of the keys beside model and data, as the parser of `n2uq fit` has them."""
    from lightning_n2uq.cli.training import N2UQCLI

    class ParsingOnly(N2UQCLI):
        def before_instantiate_classes(self) -> None:
            """No run folder."""

        def instantiate_classes(self) -> None:
            """No objects."""

        def _run_subcommand(self, subcommand: str) -> None:
            """No run."""

    path = find_config("digits/n2uq_w2a2")
    parser = ParsingOnly("fit", ["--config", path], [path])._parser("fit")
    groups: dict[str, list[str]] = {}
    for action in parser._actions:
        key = action.dest
        if key.startswith(("model", "data")) or key in ("help", "config", "print_config"):
            continue
        if action.help == "Path to a configuration file.":  # a group as a whole
            continue
        group = key.partition(".")[0] if "." in key else "run"
        kind = getattr(action, "_typehint", None) or action.type
        cells = (f"`{key}`", _code(_type_name(kind)), _code(_default(action)), _cell(action.help or ""))
        groups.setdefault(group, []).append(f"| {' | '.join(cells)} |")
    titles = {"run": "Keys of a run", "trainer": "The Trainer's keys"}
    return [
        part
        for group, rows in groups.items()
        for part in (f"## {titles.get(group, f'`{group}`')}", _TABLE + "\n".join(rows))
    ]


def _type_name(kind: Any) -> str:  # noqa: ANN401 -- a type, or jsonargparse's own
    text = getattr(kind, "__name__", "") if isinstance(kind, type) else str(kind or "")
    return text.replace("typing.", "").replace("lightning.pytorch.", "").partition(" at 0x")[0][:120]


def _default(action: Any) -> str:  # noqa: ANN401 -- argparse's action
    text = " ".join(str(action.default).split())
    return text if len(text) < 80 and "==" not in text and " at 0x" not in text else "see `--print_config`"


def _code(value: object) -> str:
    text = "" if value is None else str(value)
    if not text or text.startswith("see "):
        return text
    return f"`{text}`".replace("|", r"\|") if "`" not in text else _cell(text)


def _cell(text: str) -> str:
    words = " ".join(text.split()).replace("%s", "").replace("%%", "%")
    return words.replace("|", r"\|")
