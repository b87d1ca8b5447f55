"""The progress bar of a run: one line."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from lightning_n2uq.utils import compat_lightning

_MOST = 3  # metrics that an ordinary terminal has room for


class RunProgressBar(RichProgressBar):
    """Lightning's bar without the run's version, and with the metrics that matter on one line.

    Shown are the training loss and what the checkpoint watches; of a module that logs other names, the first
    three. The arguments are `RichProgressBar`'s.
    """

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Returns the metrics that are shown."""
        metrics = dict(super().get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)
        watched = getattr(trainer.checkpoint_callback, "monitor", None)
        chosen = [
            name for name in ("train/loss", "val/loss" if watched is None else watched) if name in metrics
        ]
        names = chosen if "train/loss" in chosen else list(metrics)[:_MOST]
        return {name: metrics[name] for name in names}

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Returns the columns; neither they nor the metrics behind them are to be wrapped."""
        columns = list(super().configure_columns(trainer))
        compat_lightning.keep_on_one_line(self, columns)
        return columns
