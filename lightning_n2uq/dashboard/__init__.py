"""`n2uq dashboard`: the W&B workspace for this package's runs, pushed or written as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_n2uq.utils.atomic import replacing

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns 0; raises `ValueError` where wandb-workspaces or an account is missing."""
    parser = argparse.ArgumentParser(
        prog="n2uq dashboard",
        description="Build the W&B workspace of a project: accuracy, thresholds, entropy, traffic, speed.",
    )
    parser.add_argument("--entity", required=True, help="W&B user or team")
    parser.add_argument("--project", default="lightning_n2uq", help="W&B project (default: %(default)s)")
    parser.add_argument(
        "--name", default="lightning_n2uq", help="name of the workspace (default: %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="write the workspace's JSON and push nothing")
    parser.add_argument("--output", "-o", help="with --dry-run: file for the JSON (default: standard output)")
    options = parser.parse_args(argv)
    if options.output and not options.dry_run:
        raise ValueError(f"output: got {options.output!r}, allowed with --dry-run only")

    from lightning_n2uq.dashboard.workspace import build_workspace, push, to_json

    workspace = build_workspace(options.entity, options.project, options.name)
    if not options.dry_run:
        print(f"dashboard  {push(workspace)}")
        return 0
    text = to_json(workspace)
    if options.output is None:
        print(text)
    else:
        with replacing(options.output) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    return 0
