"""What `QuantizationMonitor` leaves in the run's folder, for `n2uq report` and for scripts."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from torchmetrics import Metric

from lightning_n2uq.report.layer_record import LayerRecord

SNAPSHOTS = "quantization.jsonl"
"""One line per epoch: `{"step", "epoch", "layers": [LayerRecord, ..]}`."""

CONFUSION = "confusion.json"
"""`{"val": matrix, "test": matrix}`, rows are true classes; the last evaluation of each."""


def run_folder(trainer: Trainer, dirpath: str | None) -> Path:
    """The folder to write to: `dirpath`, or that of the first logger, or the Trainer's root.

    Has to be called on all ranks: Lightning agrees on the logger's folder among them.
    """
    return Path(dirpath or trainer.log_dir or trainer.default_root_dir)


def append_snapshot(folder: Path, step: int, epoch: int, records: Sequence[LayerRecord]) -> None:
    """Adds one line to the run's snapshots."""
    folder.mkdir(parents=True, exist_ok=True)
    line = {"step": step, "epoch": epoch, "layers": [record.as_dict() for record in records]}
    with (folder / SNAPSHOTS).open("a", encoding="ascii") as file:
        file.write(json.dumps(line, separators=(",", ":")) + "\n")


def drop_snapshots_after(folder: Path, step: int) -> None:
    """Keeps only the run's snapshots of this optimizer step and before; the file is replaced as a whole."""
    path = folder / SNAPSHOTS
    if not path.is_file():
        return
    lines = [
        line for line in path.read_text(encoding="ascii").splitlines(keepends=True) if _step(line) <= step
    ]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(lines), encoding="ascii")
    os.replace(partial, path)


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except ValueError:  # the process was killed in the middle of the last line
        return float("inf")


def write_confusion(trainer: Trainer, pl_module: LightningModule, stage: str, folder: Path) -> None:
    """Writes the confusion matrix of a module that keeps one in a metric called `<stage>_confusion`.

    Has to be called on all ranks: the matrix is summed over them.
    """
    metrics = [m for name, m in pl_module.named_modules() if name.rpartition(".")[2] == f"{stage}_confusion"]
    if not metrics or not isinstance(metrics[0], Metric) or not metrics[0].update_called:
        return
    matrix = metrics[0].compute().tolist()
    if not trainer.is_global_zero:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFUSION
    known = json.loads(path.read_text(encoding="ascii")) if path.is_file() else {}
    path.write_text(json.dumps({**known, stage: matrix}, separators=(",", ":")), encoding="ascii")
