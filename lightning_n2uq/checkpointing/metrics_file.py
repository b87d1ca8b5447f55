"""Let `metrics.csv` of a resumed run go on: no row is lost and none is there twice.

Lightning's CSVLogger deletes a file that it finds. Here the file is put aside before the logger looks, and
comes back cut to the rows that were there when the checkpoint was written.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger

_NAME = "metrics.csv"
_ASIDE = "metrics.csv.resuming"


def count_rows(loggers: Sequence[Logger]) -> list[int]:
    """Rows in the files of the CSV loggers, those still in memory written first."""
    counts = []
    for logger in _csv_loggers(loggers):
        logger.save()
        path = Path(logger.log_dir, _NAME)
        counts.append(max(path.read_bytes().count(b"\n") - 1, 0) if path.is_file() else 0)
    return counts


def put_aside(loggers: Sequence[Logger]) -> None:
    """Before the loggers open their files; a file put aside by a run that died since stays the valid one."""
    for logger in _csv_loggers(loggers):
        path = Path(logger.log_dir, _NAME)
        aside = path.with_name(_ASIDE)
        if path.is_file() and not aside.is_file():
            os.replace(path, aside)


def bring_back(loggers: Sequence[Logger], counts: Sequence[int] | None = None) -> None:
    """Restores what `put_aside` put aside, cut to `counts` rows (None: whole)."""
    for index, logger in enumerate(_csv_loggers(loggers)):
        path = Path(logger.log_dir, _NAME)
        aside = path.with_name(_ASIDE)
        if not aside.is_file():
            continue
        kept = None if counts is None or index >= len(counts) else counts[index]
        header = _cut(aside, kept)
        os.replace(aside, path)
        logger.experiment.metrics_keys = header


def log_row(loggers: Sequence[Logger], row: Mapping[str, float], step: int) -> None:
    """Logs a row to the CSV loggers only."""
    for logger in _csv_loggers(loggers):
        logger.log_metrics(dict(row), step)
        logger.save()


def _csv_loggers(loggers: Sequence[Logger]) -> list[Any]:
    return [logger for logger in loggers if isinstance(logger, CSVLogger)]


def _cut(path: Path, rows: int | None) -> list[str]:
    """Keeps the header and the first rows; returns the header."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    if rows is not None and len(lines) > rows + 1:
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines[: rows + 1])
        os.replace(partial, path)
    return lines[0] if lines else []
