"""A callback for configs: writes this process's number once training is under way, and slows steps down."""

from __future__ import annotations

import os
import time
from pathlib import Path

import lightning


class Marker(lightning.Callback):
    """Writes ``folder/pidN`` at step ``step`` of rank ``N`` and then waits ``pause`` seconds per step."""

    def __init__(self, folder: str, step: int = 3, pause: float = 0.05) -> None:
        self.folder, self.step, self.pause = folder, step, pause

    def on_train_batch_start(self, trainer, *_):
        time.sleep(self.pause)
        if trainer.global_step == self.step:
            Path(self.folder, f"pid{trainer.global_rank}").write_text(str(os.getpid()))
