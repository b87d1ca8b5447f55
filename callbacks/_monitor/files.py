"""What `QuantizationMonitor` leaves in the run's folder, for `n2uq report` and for scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from torchmetrics import Metric

from lightning_n2uq.report.layer_record import LayerRecord
from lightning_n2uq.report.run_data import CONFUSION, SNAPSHOTS
from lightning_n2uq.utils.atomic import replacing
from lightning_n2uq.utils.class_names import KEY, trainers_class_names


def run_folder(trainer: Trainer, dirpath: str | None) -> Path:
    """Returns the folder to write to: `dirpath`, or that of the first logger, or the Trainer's root.

    All ranks have to call it: Lightning agrees on the logger's folder among them.
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
    lines = path.read_text(encoding="ascii").splitlines(keepends=True)
    with replacing(path) as partial:
        partial.write_text("".join(line for line in lines if _step(line) <= step), encoding="ascii")


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except ValueError:  # the process was killed in the middle of the last line
        return float("inf")


def write_confusion(trainer: Trainer, pl_module: LightningModule, stage: str, folder: Path) -> None:
    """Writes the confusion matrix of a module that keeps one in a metric called `<stage>_confusion`.

    All ranks have to call it: the matrix is summed over them.
    """
    metrics = [m for name, m in pl_module.named_modules() if name.rpartition(".")[2] == f"{stage}_confusion"]
    if not metrics or not isinstance(metrics[0], Metric) or not metrics[0].update_called:
        return
    matrix = metrics[0].compute().tolist()
    if not trainer.is_global_zero:
        return
    path = folder / CONFUSION
    known = json.loads(path.read_text(encoding="ascii")) if path.is_file() else {}
    if (names := trainers_class_names(trainer)) is not None:
        known[KEY] = names
    with replacing(path) as partial:
        partial.write_text(json.dumps({**known, stage: matrix}, separators=(",", ":")), encoding="ascii")
