"""Names of the sub-commands and where their code lives; modules are imported only when a name is used.

To add `n2uq doctor`: write `run(arguments: list[str]) -> int` in its own module and add a line to
`COMMANDS`. It may raise ValueError for a user's mistake: `lightning_n2uq.cli.main` prints it as one line.
"""

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A sub-command outside of the Trainer: `module:function` and one line of help."""

    target: str
    help: str

    def run(self, arguments: list[str]) -> int:
        """Imports the target and calls it with the arguments after the sub-command's name."""
        module, _, function = self.target.partition(":")
        return int(getattr(importlib.import_module(module), function)(arguments) or 0)


TRAINING_COMMANDS: dict[str, str] = {
    "fit": "train a network (and validate it after every epoch)",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
    "predict": "classes of image files (--images), or of the test split",
}

COMMANDS: dict[str, Command] = {
    "configs": Command(
        "lightning_n2uq.cli.configs:list_configs", "list the configs that come with the package"
    ),
    "completion": Command("lightning_n2uq.cli.completion:main", "a script for bash, zsh or fish"),
    "summary": Command("lightning_n2uq.summary:main", "bits, operations and bytes of every layer"),
    "sensitivity": Command(
        "lightning_n2uq.cli.sensitivity:main", "score layers, choose their bits within a budget"
    ),
    "advise": Command("lightning_n2uq.cli.advise:main", "which gradient compression would pay on a job"),
    "report": Command("lightning_n2uq.report:main", "a self-contained page of one or several runs"),
    "dashboard": Command("lightning_n2uq.dashboard:main", "build the Weights & Biases workspace"),
    "convert": Command("lightning_n2uq.interop.command:main", "read or write the published N2UQ format"),
    "export": Command("lightning_n2uq.export.command:main", "deploy a checkpoint as an integer network"),
    "doctor": Command("lightning_n2uq.doctor:main", "kernels in use and why, versions, devices"),
}


def usage() -> str:
    """Returns the text of `n2uq --help`."""
    texts = {**TRAINING_COMMANDS, **{name: command.help for name, command in COMMANDS.items()}}
    width = max(map(len, texts))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in texts.items())
    return (
        "usage: n2uq COMMAND [options]      (n2uq COMMAND --help lists the options)\n\n"
        f"{listing}\n\n"
        "  n2uq fit --config digits/n2uq_w2a2.yaml        train the example\n"
        "  n2uq fit --config images/n2uq_w2a2.yaml --data.root photos   train on your own images\n"
        "  n2uq test --ckpt_path runs/.../best.ckpt       evaluate what it wrote\n\n"
        "options of every command:\n"
        "  --debug    show the traceback of an error (also N2UQ_DEBUG=1)\n"
        "  --version  print the version"
    )
