"""A run's figures: read from what `n2uq fit` leaves in its folder, kept as one JSON file per run."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import description
from benchmarks.study.plan import Run, Study
from lightning_n2uq import __version__

SENT = "comm/sent_bytes"
OSCILLATING = "oscillation/oscillating"
CURVES = ("train/loss", "train/acc", "val/loss", "val/acc")


def last_checkpoint(folder: Path) -> Path:
    """The last checkpoint below a run's folder.

    Raises:
        ValueError: There is none.
    """
    found = sorted(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"got no last.ckpt in {folder}, expected that of a finished run")
    return found[-1]


def curves(metrics: Iterable[Path]) -> dict[str, list[float]]:
    """One number per epoch and curve from a run's `metrics.csv` files.

    Raises:
        ValueError: No file has a row of `val/acc`.
    """
    by_epoch: dict[str, dict[int, float]] = {name: {} for name in CURVES}
    for path in metrics:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name in CURVES:
                    if row.get(name):
                        by_epoch[name][int(row["epoch"])] = float(row[name])
    if not by_epoch["val/acc"]:
        raise ValueError("metrics.csv: got no row of val/acc, expected one per epoch")
    return {name: [values[epoch] for epoch in sorted(values)] for name, values in by_epoch.items()}


def logged(metrics: Iterable[Path], name: str) -> list[float]:
    """Every value of a metric, in the order of the files and their rows."""
    values = []
    for path in metrics:
        with path.open(newline="", encoding="utf-8") as file:
            values += [float(row[name]) for row in csv.DictReader(file) if row.get(name)]
    return values


def sent_bytes(metrics: Iterable[Path]) -> float | None:
    """Bytes that a rank sends per exchange, the mean of what `CommunicationMonitor` logged, if it did."""
    values = logged(metrics, SENT)
    return sum(values) / len(values) if values else None


def oscillating(metrics: Iterable[Path]) -> float | None:
    """The share of weights that oscillate at the end, if `OscillationControl` has logged it."""
    values = logged(metrics, OSCILLATING)
    return values[-1] if values else None


def collect(run: Run, study: Study, folder: Path, seconds: float) -> dict[str, Any]:
    """The figures of a finished run.

    The accuracy is that of the last weights: the images of the test split are looked at after every epoch
    for the curve alone, and choose nothing.

    Args:
        run: The run.
        study: The study that it belongs to.
        folder: The run's folder.
        seconds: Time of all its processes together.

    Raises:
        ValueError: The folder's `metrics.csv` does not hold one accuracy per epoch.
    """
    files = sorted(folder.rglob("metrics.csv"))
    found = curves(files)
    if len(found["val/acc"]) != run.epochs:
        raise ValueError(
            f"{run.name}: got {len(found['val/acc'])} epochs in metrics.csv, expected {run.epochs}"
        )
    return {
        "run": run.name,
        "row": run.row,
        "config": run.config or run.row,
        "seed": run.seed,
        "identity": run.identity(study.configs),
        "epochs": run.epochs,
        "settings": dict(run.settings),
        "optimizer": run.source,
        "start": run.start,
        "test_acc": found["val/acc"][-1],
        "seconds": round(seconds, 1),
        "version": __version__,
        "machine": description(torch.device("cpu")),
        "sent_bytes": sent_bytes(files),
        "oscillating": oscillating(files),
        "curves": found,
    }


def path_of(results: Path, study: Study, run: Run) -> Path:
    """The file that holds a run's figures."""
    return results / f"study_{study.name}" / f"{run.name}.json"


def load(results: Path, study: Study, run: Run) -> dict[str, Any] | None:
    """A run's figures, or None where it has not run with the present config and settings."""
    path = path_of(results, study, run)
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if found["identity"] == run.identity(study.configs) else None


def save(results: Path, study: Study, run: Run, figures: dict[str, Any]) -> None:
    """Write a run's figures under their final name at once."""
    path = path_of(results, study, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".partial")
    part.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
