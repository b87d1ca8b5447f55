"""`n2uq fit --help` in pages: the common options, then any class by name, then everything."""

from __future__ import annotations

import inspect
import re
import textwrap

from lightning_n2uq.cli import sources
from lightning_n2uq.cli.errors import names_and_hint

ALL = "all"
_FLAGS = ("--help", "-h")
_WIDTH = 110
_KINDS = {
    "model": "models",
    "data": "data",
    "trainer.callbacks": "callbacks",
    "trainer.strategy": "strategies",
}
_FIT = """\
  --resume auto                  go on with this config's interrupted run
  --test_after_fit true          evaluate the best checkpoint on the test split at the end
  --model.init_from FILE         start from the weights of another network
  --model.lr NUMBER              learning rate
  --trainer.max_epochs N         how long to train
"""
_TRAINED = """\
  --ckpt_path FILE               the trained network; its config.yaml is found beside it (--ckpt is the same)
"""
_IMAGES = """\
  --images PATH                  an image, a folder or a .zip, see n2uq predict --images --help
"""
_COMMON = """\
  --config NAME|FILE             a packaged config (n2uq configs lists them) or your own; may be repeated
{own}  --data.root PATH               where the data are
  --data.batch_size N            samples per step and device; less needs less memory
  --data.num_workers N           processes that load data
  --trainer.devices N            devices, or ranks on a CPU
  --trainer.accelerator NAME     cpu, gpu, auto
  --trainer.precision NAME       32-true, bf16-mixed, 16-mixed
  --trainer.strategy NAME        nuqsgd and others, for several devices
  --trainer.callbacks+=NAME      adds a callback (--trainer.callbacks.KEY VALUE: its arguments)
  --checkpoint null              no checkpoints
  --wandb MODE                   online, offline (default, no account), disabled
  --seed_everything N            the seed of weights, order and augmentation
  --print_config                 print every setting and stop
"""


def topic(arguments: list[str]) -> str | None:
    """Returns what `--help` asks for: a name, `all`, nothing in particular (``""``), or None without it."""
    for place, text in enumerate(arguments):
        flag, _, value = text.partition("=")
        if flag in _FLAGS:
            following = arguments[place + 1] if place + 1 < len(arguments) else ""
            return value or ("" if following.startswith("-") else following)
    return None


def page(command: str, about: str) -> str:
    """Returns the help of a sub-command, or of what it is about.

    Raises:
        ValueError: There is no class of that name.
    """
    if not about:
        return _overview(command)
    classes = dict(sources.our_classes())
    if (trainer := sources.trainer()) is not None:
        classes["Trainer"] = trainer
    found = classes.get("Trainer" if about == "trainer" else about)
    if found is None:
        raise ValueError(f"help: got {about!r}, {names_and_hint([ALL, *classes], about)}")
    return _class(found)


def _overview(command: str) -> str:
    own = _FIT if command == "fit" else _TRAINED + (_IMAGES if command == "predict" else "")
    lines = [f"usage: n2uq {command} --config NAME [options]", "", "common options:", _COMMON.format(own=own)]
    lines.append("arguments of a class, with their meaning and defaults (--help NAME):")
    for part, title in _KINDS.items():
        names = [cls.name for cls in sources.our_classes().values() if cls.part == part]
        text = f"{title + ':':<12} {', '.join(names)}"
        lines.append(
            textwrap.indent("\n".join(textwrap.wrap(text, _WIDTH - 4, subsequent_indent=" " * 13)), "  ")
        )
    lines += [f"  {'others:':<12} Trainer", "", f"n2uq {command} --help all lists every option there is."]
    return "\n".join(lines)


def _class(cls: sources.Class) -> str:
    doc = inspect.cleandoc(cls.doc)
    summary = doc.partition("\n\n")[0].replace("\n", " ") if cls.part != "trainer" else "Lightning's trainer."
    lines = [f"{cls.name}: {summary}", ""]
    texts = _described(doc)
    for parameter in cls.parameters or ():
        default = f" (default: {parameter.default})" if parameter.default else " (needed)"
        lines.append(f"  --{cls.part}.{parameter.name}  {_kind(parameter.kind)}{default}")
        if parameter.name in texts:
            lines.append(
                textwrap.fill(
                    texts[parameter.name], _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
                )
            )
    if cls.parameters is None:
        lines.append("  its arguments: n2uq fit --help all, or its documentation")
    return "\n".join(lines)


def _kind(text: str) -> str:
    if choices := re.fullmatch(r"Literal\[(.*)\]", text):
        return choices.group(1).replace("'", "").replace(", ", "|")
    return text.replace("None", "null")


def _described(doc: str) -> dict[str, str]:
    """Returns the texts of a docstring's `Args:` by name."""
    found = re.search(r"^\s*Args:\n(.*?)(?=^\S|\Z)", doc, re.DOTALL | re.MULTILINE)
    if not found:
        return {}
    body = textwrap.dedent(found.group(1))
    entries = re.split(r"^(\w+)(?: \([^)]*\))?:", body, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(entries[1::2], entries[2::2], strict=True)}
