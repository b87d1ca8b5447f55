"""The argument parser of sub-commands that are no Trainer's."""

from __future__ import annotations

import argparse


def command_parser(name: str, about: str, examples: str | None = None) -> argparse.ArgumentParser:
    """Returns a parser without options.

    Args:
        name: The sub-command.
        about: The command's docstring, of which help shows the first line.
        examples: What help shows last, line by line as it is.
    """
    return argparse.ArgumentParser(
        f"n2uq {name}",
        description=about.partition("\n")[0],
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
