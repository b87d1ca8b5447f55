"""`n2uq report`: one self-contained HTML page about one run, or about several side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_n2uq.utils.atomic import replacing

__all__ = ["main", "write_report"]


def write_report(run_dirs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Writes the page.

    Args:
        run_dirs: Folders of runs, as `n2uq fit` leaves them, or folders with runs below them.
        output: The file to write; None writes `report.html`, in the run's folder if there is one run, else in
            the working directory.

    Returns:
        The path of the page, which needs no other file and no network.

    Raises:
        ValueError: A folder does not exist, holds nothing of a run or too many runs; plotly is not installed.
    """
    from lightning_n2uq.report.page import render
    from lightning_n2uq.report.run_data import read_runs, runs_below

    runs = read_runs([run for folder in run_dirs for run in runs_below(Path(folder))])
    default = runs[0].folder / "report.html" if len(runs) == 1 else Path("report.html")
    path = default if output is None else Path(output)
    try:
        text = render(runs)
    except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
        folders = ", ".join(repr(str(run.folder)) for run in runs)
        raise ValueError(
            f"run_dir: the files of {folders} hold something else than a run writes "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        ) from error
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns 0; raises `ValueError` for a user's mistake, as `write_report` does."""
    parser = argparse.ArgumentParser(
        prog="n2uq report",
        description="Write one HTML page about a run, or several side by side; it needs no network.",
    )
    parser.add_argument(
        "run_dirs", nargs="+", metavar="RUN_DIR", help="folder of a run, or with runs below it"
    )
    parser.add_argument(
        "--output", "-o", help="the page (default: RUN_DIR/report.html, of several ./report.html)"
    )
    options = parser.parse_args(argv)
    print(f"report     {write_report(options.run_dirs, options.output)}")
    return 0
