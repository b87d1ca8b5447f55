"""Names that checkpoints and early stopping watch, compared with what the sanity check has logged."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_n2uq.checkpointing import BestAndLastModelCheckpoint
from lightning_n2uq.checkpointing.reading import read_file
from lightning_n2uq.utils.compat_lightning import checkpoint_to_come

_RISING = ("acc", "auroc", "auc", "f1", "iou", "map", "dice", "psnr", "ssim", "precision", "recall")
_FALLING = ("loss", "error", "mse", "mae", "rmse", "perplexity", "ppl", "nll", "fid")


class CheckMonitors(Callback):
    """Refuses the name of a validation metric that validation does not log, before the first epoch.

    Lightning looks for it after the epoch. Names that do not begin with `val` may be logged by training.

    Args:
        chosen_by_default: Whether nobody has said what the run's checkpoint watches. The best
            checkpoint of a module without that metric is by another of its validation: scores, then losses.
    """

    def __init__(self, chosen_by_default: bool = False) -> None:
        self.chosen_by_default = chosen_by_default

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watches what the run that wrote the checkpoint did."""
        path = checkpoint_to_come(trainer)
        if not self.chosen_by_default or path is None or not Path(path).is_file():
            return
        states = read_file(path, "ckpt_path", mmap=True).get("callbacks") or {}
        for callback in _defaults(trainer):
            for key in states:
                kind, brace, arguments = str(key).partition("{")
                if kind == type(callback).__qualname__ and brace:
                    chosen: dict[str, Any] = ast.literal_eval(brace + arguments)
                    callback.watch(chosen.get("monitor"), chosen.get("mode", "min"))

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares the names; raises ValueError with those that there are."""
        known = sorted(trainer.callback_metrics)
        self._choose(trainer, known)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if not known or not isinstance(monitor, str) or not monitor.startswith("val") or monitor in known:
                continue
            close = difflib.get_close_matches(monitor, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"{type(callback).__name__}.monitor: got {monitor!r}, {hint}allowed are {', '.join(known)}"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the checkpoint of a run without validation watch nothing: it is the last one."""
        if not trainer.enable_validation:
            self._choose(trainer, ["without validation"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chooses where there was no sanity check, before the first checkpoint is written."""
        if not trainer.sanity_checking:
            self._choose(trainer, [name for name in sorted(trainer.callback_metrics) if "val" in name])

    def _choose(self, trainer: Trainer, known: list[str]) -> None:
        if not self.chosen_by_default or not known:
            return
        self.chosen_by_default = False
        for callback in _defaults(trainer):
            if callback.monitor not in known:
                callback.watch(*choice(known))
                said = (
                    f"{callback.monitor} ({callback.mode})" if callback.monitor else "nothing: it is the last"
                )
                rank_zero_info(f"checkpoint.monitor: the best checkpoint is by {said}")


def choice(names: Iterable[str]) -> tuple[str | None, str]:
    """Returns a metric to judge checkpoints by, and `min` or `max`; None where no name tells."""
    for words, mode in ((_RISING, "max"), (_FALLING, "min")):
        for word in words:
            for name in names:
                if word in name.lower():
                    return name, mode
    return None, "min"


def _defaults(trainer: Trainer) -> list[BestAndLastModelCheckpoint]:
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, BestAndLastModelCheckpoint)]
