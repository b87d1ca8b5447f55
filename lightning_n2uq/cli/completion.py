"""`n2uq completion SHELL`: a script that completes commands, names of configs and common options."""

from __future__ import annotations

import re

from lightning_n2uq.cli import help_pages, sources
from lightning_n2uq.cli.commands import COMMANDS, TRAINING_COMMANDS
from lightning_n2uq.cli.configs import packaged_configs

SHELLS = ("bash", "zsh", "fish")
_BASH = """\
# eval "$(n2uq completion bash)"
_n2uq() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
  case "$before" in
    n2uq) COMPREPLY=($(compgen -W "{commands}" -- "$word")); return;;
    --config|-c) COMPREPLY=($(compgen -W "{configs}" -- "$word") $(compgen -f -- "$word")); return;;
    --wandb) COMPREPLY=($(compgen -W "online offline disabled" -- "$word")); return;;
    --help) COMPREPLY=($(compgen -W "{topics}" -- "$word")); return;;
  esac
  case "$word" in
    -*) COMPREPLY=($(compgen -W "{options}" -- "$word"));;
    *) COMPREPLY=($(compgen -f -- "$word"));;
  esac
}}
complete -o filenames -o nosort -F _n2uq n2uq
"""
_ZSH = '# eval "$(n2uq completion zsh)"\nautoload -U +X bashcompinit && bashcompinit\n'
_FISH = """\
# n2uq completion fish | source
complete -c n2uq -n "__fish_use_subcommand" -f -a "{commands}"
complete -c n2uq -l config -x -a "{configs}"
complete -c n2uq -l wandb -x -a "online offline disabled"
complete -c n2uq -l help -x -a "{topics}"
"""


def main(arguments: list[str]) -> int:
    """Prints the script for a shell.

    Raises:
        ValueError: The shell is another one.
    """
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        shown = " ".join(arguments) or "none"
        raise ValueError(f"completion: got {shown!r}, allowed are {', '.join(SHELLS)}")
    print(script(arguments[0]), end="")
    return 0


def script(shell: str) -> str:
    """Returns the text that a shell evaluates."""
    pages = "\n".join(help_pages.page(command, "") for command in TRAINING_COMMANDS)
    words = {
        "commands": " ".join([*TRAINING_COMMANDS, *COMMANDS]),
        "configs": " ".join(f"{name}.yaml" for name in packaged_configs()),
        "options": " ".join(sorted(set(re.findall(r"^  (--[\w.]+)", pages, re.MULTILINE)) | {"--help"})),
        "topics": " ".join(["all", "Trainer", *sources.our_classes()]),
    }
    if shell == "fish":
        extra = "".join(
            f"complete -c n2uq -l {option.removeprefix('--')} -r\n"
            for option in words["options"].split()
            if option not in ("--config", "--wandb", "--help")
        )
        return _FISH.format(**words) + extra
    return (_ZSH if shell == "zsh" else "") + _BASH.format(**words)
