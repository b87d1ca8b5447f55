"""One rank of the soak: trains on the digits as users do and notes what its process holds."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from lightning_n2uq.callbacks import QuantizationMonitor
from lightning_n2uq.callbacks.communication_monitor import CommunicationMonitor
from lightning_n2uq.datamodules import DigitsDataModule
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.strategies import NUQSGDStrategy

CONFIG = Path(__file__).parent.parent / "configs" / "digits" / "n2uq_w2a2.yaml"
PAUSE_S = 5.0  # a step that takes longer was stopped from outside; the rest of it is not training time


class Probe(lightning.Callback):
    """Every ``every`` steps: resident memory, open files, threads, and the steps' times since the last.

    Args:
        path: JSON lines to write, one per sample.
        every: Steps between samples.
        seconds: Training time after which the fit ends; pauses do not count.
    """

    def __init__(self, path: Path, every: int, seconds: float) -> None:
        self._file = path.open("w")  # stays open, so that it does not change what is counted
        self.every, self.seconds = every, seconds
        self._elapsed, self._wall = 0.0, list[float]()
        self._before, self._cpu = 0.0, 0.0

    def on_train_start(self, *_: Any) -> None:
        """Start the clocks."""
        self._before, self._cpu = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Note the step; every so often take a sample and let rank 0 decide whether to go on."""
        now = time.perf_counter()
        self._wall.append(now - self._before)
        self._elapsed += min(now - self._before, PAUSE_S)
        self._before = now
        if trainer.global_step % self.every == 0:
            self._sample(trainer.global_step)
            trainer.should_stop = trainer.strategy.broadcast(self._elapsed > self.seconds)

    def _sample(self, step: int) -> None:
        cpu = time.process_time()
        figures = resources() | {
            "step": step,
            "seconds": round(self._elapsed, 3),
            "step_ms": round(1e3 * statistics.median(self._wall), 3),
            "cpu_ms": round(1e3 * (cpu - self._cpu) / len(self._wall), 3),
        }
        self._cpu = cpu
        self._wall.clear()
        self._file.write(json.dumps(figures) + "\n")
        self._file.flush()


def resources() -> dict[str, float]:
    """Resident megabytes, open file handles and threads of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory_mb": round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 3),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def loggers(folder: Path) -> list[Logger]:
    """CSV and W&B offline."""
    return [CSVLogger(folder, "csv"), WandbLogger(save_dir=folder, offline=True, project="soak")]


def main() -> None:
    """Train until the time is over."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lightning.seed_everything(0, verbose=False)
    settings = yaml.safe_load(CONFIG.read_text())["model"]["init_args"]
    settings["schedule"] = "constant"
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=ranks,
        strategy=NUQSGDStrategy(bits=4),
        max_epochs=-1,
        check_val_every_n_epoch=10,
        log_every_n_steps=10,
        logger=loggers(options.folder),
        callbacks=[
            CommunicationMonitor(every_n_steps=50),
            QuantizationMonitor(every_n_steps=50),
            Probe(options.folder / f"rank{rank}.jsonl", options.every, options.seconds),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = QuantizedClassifier(num_classes=10, in_channels=1, image_size=8, **settings)
    trainer.fit(model, datamodule=DigitsDataModule(batch_size=8, shift=1))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
