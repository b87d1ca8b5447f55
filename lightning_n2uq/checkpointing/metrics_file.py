"""Lets `metrics.csv` of a resumed run go on: no row is lost and none is there twice.

Lightning's CSVLogger deletes a file that it finds. Here the file is put aside before the logger looks, and
comes back with the rows that belong to the checkpoint.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_n2uq.utils.atomic import replacing

_NAME = "metrics.csv"
_ASIDE = "metrics.csv.resuming"


def count_rows(loggers: Sequence[Logger]) -> list[int]:
    """Returns the numbers of rows in the CSV loggers' files, those still in memory written first."""
    counts = []
    for logger in _csv_loggers(loggers):
        logger.save()
        path = Path(logger.log_dir, _NAME)
        counts.append(max(path.read_bytes().count(b"\n") - 1, 0) if path.is_file() else 0)
    return counts


def put_aside(loggers: Sequence[Logger]) -> None:
    """Puts the files aside before the loggers open them.

    A file that a run put aside and died since stays the valid one.
    """
    for logger in _csv_loggers(loggers):
        path = Path(logger.log_dir, _NAME)
        aside = path.with_name(_ASIDE)
        if path.is_file() and not aside.is_file():
            os.replace(path, aside)


def bring_back(loggers: Sequence[Logger], counts: Sequence[int] | None = None, step: int = 0) -> None:
    """Restores what `put_aside` put aside.

    Args:
        loggers: The trainer's loggers.
        counts: Rows of each file when the checkpoint was written; None keeps all rows.
        step: Optimizer steps of the checkpoint. Rows that training logged for them right after the checkpoint
            was written stay too: the resumed run does not log them again.
    """
    for index, logger in enumerate(_csv_loggers(loggers)):
        path = Path(logger.log_dir, _NAME)
        aside = path.with_name(_ASIDE)
        if not aside.is_file():
            continue
        with aside.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        if counts is not None and index < len(counts):
            later = (row for row in rows[counts[index] :] if _of_training(header, row, step))
            _write(aside, [header, *rows[: counts[index]], *later])
        os.replace(aside, path)
        logger.experiment.metrics_keys = header


def _csv_loggers(loggers: Sequence[Logger]) -> list[Any]:
    return [logger for logger in loggers if isinstance(logger, CSVLogger)]


def _of_training(header: list[str], row: list[str], step: int) -> bool:
    """Returns whether a row is of a step before `step` and not of a validation, which is repeated."""
    values = {name: value for name, value in zip(header, row, strict=False) if value}
    return int(values.get("step", step)) < step and not any(name.startswith("val") for name in values)


def _write(path: Path, rows: list[list[str]]) -> None:
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
