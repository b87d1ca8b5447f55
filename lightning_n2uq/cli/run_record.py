"""Writes `run.json` into a run's folder: what was trained, on which data, by which code, and for how long."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_n2uq.report.run_data import RECORD
from lightning_n2uq.summary import ModelSummary, weigh
from lightning_n2uq.utils.atomic import replacing
from lightning_n2uq.utils.version import __version__, git_revision


class RunRecord(Callback):
    """Keeps the facts of a run that neither its config nor its metrics tell.

    The file is written when training starts and after every epoch, so that an interrupted run has one too.
    The seconds of a resumed run are added to those before.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: str) -> None:
        self._path = Path(folder, RECORD)
        self._facts: dict[str, Any] = {}
        self._before = self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collects what is known before the first step."""
        if not _keeps_files(trainer):
            return
        self._before = _seconds(self._path) if trainer.ckpt_path else 0.0
        self._started = time.monotonic()
        self._facts = {
            "version": __version__,
            "revision": git_revision(),
            "torch": torch.__version__,
            "ranks": trainer.world_size,
            **_network(weigh(pl_module)),
            **_data(trainer),
        }
        self._write()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the seconds so far."""
        self._write()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the seconds of all training."""
        self._write()

    def _write(self) -> None:
        if not self._facts:
            return
        seconds = round(self._before + time.monotonic() - self._started, 1)
        with replacing(self._path) as partial:
            partial.write_text(json.dumps({**self._facts, "seconds": seconds}, indent=1), encoding="utf-8")


def _keeps_files(trainer: Trainer) -> bool:
    kept = bool(trainer.loggers or trainer.checkpoint_callback)
    return trainer.is_global_zero and kept and not getattr(trainer, "fast_dev_run", False)


def _seconds(path: Path) -> float:
    """Returns the seconds that a record counts; 0 where there is none that can be read."""
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, TypeError, LookupError):
        return 0.0


LAYER_KIND = ("weight_method", "weight_bits", "activation_method", "activation_bits", "count")


def _network(summary: ModelSummary) -> dict[str, Any]:
    kinds = Counter(
        (layer.weight_method, layer.weight_bits, layer.activation_method, layer.activation_bits)
        for layer in summary.layers
    )
    inside = sum(layer.weights + layer.biases for layer in summary.layers)
    return {
        "parameters": inside + summary.other_parameters,
        "packed_bytes": summary.packed_bytes(),
        "float_bytes": summary.float_bytes(),
        "layers": [dict(zip(LAYER_KIND, [*kind, count], strict=True)) for kind, count in kinds.most_common()],
    }


def _data(trainer: Trainer) -> dict[str, Any]:
    module = getattr(trainer, "datamodule", None)
    if module is None:
        return {}
    facts: dict[str, Any] = {"data": type(module).__name__}
    for name in ("root", "num_classes", "class_names"):
        value = getattr(module, name, None)
        if value is not None:
            facts[name] = value if isinstance(value, (int, list)) else str(value)
    splits = getattr(module, "splits", {})
    sizes = {split: len(found) for split, found in splits.items() if hasattr(found, "__len__")}
    return {**facts, "samples": sizes} if sizes else facts
