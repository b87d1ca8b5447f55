"""Names that checkpoints and early stopping watch, compared with what the sanity check has logged."""

from __future__ import annotations

import difflib

from lightning.pytorch import Callback, LightningModule, Trainer


class CheckMonitors(Callback):
    """Refuses the name of a validation metric that validation does not log, before the first epoch.

    Lightning looks for it after the epoch. Names that do not begin with `val` may be logged by training.
    """

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares the names; raises ValueError with those that there are."""
        known = sorted(trainer.callback_metrics)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if not known or not isinstance(monitor, str) or not monitor.startswith("val") or monitor in known:
                continue
            close = difflib.get_close_matches(monitor, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"{type(callback).__name__}.monitor: got {monitor!r}, {hint}allowed are {', '.join(known)}"
            )
