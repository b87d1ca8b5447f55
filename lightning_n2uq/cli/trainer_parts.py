"""Which of a run's default callbacks and plugins the Trainer's own switches leave in."""

from __future__ import annotations

from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, ProgressBar

from lightning_n2uq.callbacks import NonFiniteGuard, QuantizeModel
from lightning_n2uq.callbacks._quantize.order import quantizing_first
from lightning_n2uq.checkpointing import AtomicCheckpointIO


def wanted_callbacks(config: dict[str, Any], callbacks: list[Callback], guard: bool) -> list[Callback]:
    """Returns the default callbacks without those that are switched off or that the user gave.

    Args:
        config: The Trainer's arguments.
        callbacks: The default callbacks.
        guard: Whether the run has a `NonFiniteGuard`.
    """
    given = _as_list(config.get("callbacks"))
    unwanted: list[type[Callback]] = []
    if config.get("barebones"):  # measures the loop alone, and refuses whatever else there is
        config["callbacks"] = quantizing_first(given, QuantizeModel)
        config["logger"] = config["log_every_n_steps"] = None
        return []
    if config.get("enable_checkpointing") is False or config.get("fast_dev_run"):
        unwanted.append(Checkpoint)
    if config.get("logger") is False:
        unwanted.append(LearningRateMonitor)
    if config.get("enable_progress_bar") is False or any(isinstance(c, ProgressBar) for c in given):
        unwanted.append(ProgressBar)
    if not guard or any(isinstance(c, NonFiniteGuard) for c in given):
        unwanted.append(NonFiniteGuard)
    config["callbacks"] = quantizing_first(given, QuantizeModel)
    return [callback for callback in callbacks if not isinstance(callback, tuple(unwanted))]


def plugins_with_checkpoint_io(config: dict[str, Any]) -> list[Any]:
    """Returns the plugins of the config, with ours where the strategy writes ordinary checkpoint files."""
    plugins = _as_list(config.get("plugins"))
    strategy = config.get("strategy")
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    sharded = any(kind in name.lower() for kind in ("fsdp", "deepspeed", "modelparallel", "xla"))
    if sharded or any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        return plugins
    return [*plugins, AtomicCheckpointIO()]


def _as_list(value: Any) -> list[Any]:  # noqa: ANN401
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []
