"""Builds a module's network early enough to be quantized before anything looks at its layers."""

from __future__ import annotations

import functools

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden


def shards(trainer: Trainer) -> bool:
    """Returns whether the strategy restores checkpoints after `configure_model` has sharded the module."""
    return bool(trainer.strategy.restore_checkpoint_after_setup)


def build_now(trainer: Trainer, pl_module: LightningModule) -> None:
    """Calls `configure_model` as the Trainer would, and keeps the Trainer from calling it again in this run.

    The Trainer calls it after all callbacks are set up: those that look for quantized layers would find none,
    and a module that does not check what it has built would build it anew.
    """
    if not is_overridden("configure_model", pl_module):
        return
    with (
        trainer.strategy.tensor_init_context(),
        trainer.strategy.model_sharded_context(),
        trainer.precision_plugin.module_init_context(),
    ):
        pl_module.configure_model()
    skip_building(pl_module)


def skip_building(pl_module: LightningModule) -> None:
    """Makes further calls of `configure_model` do nothing, until `build_again`."""
    if is_overridden("configure_model", pl_module) and "configure_model" not in vars(pl_module):

        @functools.wraps(pl_module.configure_model)
        def built() -> None:
            """The network is there."""

        pl_module.configure_model = built  # type: ignore[method-assign]


def build_again(pl_module: LightningModule) -> None:
    """Gives the module its own `configure_model` back."""
    vars(pl_module).pop("configure_model", None)
