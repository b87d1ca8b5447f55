"""Batch-norm statistics of the network as it is validated, from a pass of their own over training batches."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_n2uq.callbacks._batch_norm.loaders import batches_again
from lightning_n2uq.checkpointing import randomness
from lightning_n2uq.quantizers.looks import looking
from lightning_n2uq.utils.compat import BatchNorm
from lightning_n2uq.utils.validation import check, check_integer


class BatchNormReestimation(Callback):
    """Estimates running statistics anew before each validation, by a pass over training batches.

    In training they are exponential averages over steps with other weights. Where quantized weights change
    level late, the averages are of networks that are gone, most of all in depthwise layers: Nagel et al.,
    "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, arXiv 2203.11086. Here
    mean and variance are plain averages over `batches` batches, with weights and quantizers as they are
    evaluated; validation, the checkpoints it leads to and all that is made from them use these. Training
    itself uses none of them and goes on as without the callback, bit for bit.

    The pass calls `training_step` of a copy of the module in evaluation mode, but for its batch norms,
    without gradients, logging or other callbacks, on the first batches of the training loader's present
    epoch. With several ranks each takes its own batches, and statistics are averaged over ranks. Batch norms
    that training keeps in evaluation mode stay as they are.

    Args:
        batches: The number of training batches at most; an epoch may have fewer.

    Raises:
        ValueError: A value is impossible, or the network has no batch norm that training updates; the
            message names the argument, the value and what is allowed.
    """

    def __init__(self, batches: int = 50) -> None:
        self.batches = check_integer("batches", batches, 1)
        self._names: list[str] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses modules without statistics, and those whose training step takes optimizer steps itself."""
        kind = type(pl_module).__name__
        check(any(map(_tracks, pl_module.modules())), "model", kind, "are networks with batch norms")
        check(pl_module.automatic_optimization, "model", kind, "are modules that optimize automatically")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Notes which batch norms are in training mode, once per epoch."""
        if batch_idx == 0 or not self._names:
            modules = pl_module.named_modules()
            self._names = [name for name, module in modules if _tracks(module) and module.training]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimates the statistics, in training alone."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self._names:
            return
        state, stage = randomness.capture(), trainer.state.stage
        # What looks at the trainer, as hooks on batches do, prepares them for training.
        trainer.training = True
        try:
            with torch.inference_mode(False), torch.no_grad(), looking():
                self._estimate(trainer, pl_module)
        finally:
            trainer.state.stage = stage
            randomness.restore(state)

    def _estimate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        twin = _twin(trainer, pl_module)
        norms = {name: twin.get_submodule(name) for name in self._names}
        for norm in norms.values():
            norm.train()
            norm.momentum = None  # type: ignore[assignment]  # a plain average
            norm.reset_running_stats()  # type: ignore[operator]
        batches = batches_again(trainer.train_dataloader, self.batches)
        for index, batch in enumerate(batches):
            moved = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            with trainer.precision_plugin.train_step_context():
                type(twin).training_step(twin, moved, index)
        for name, norm in norms.items():
            for kind in ("running_mean", "running_var"):
                mean = trainer.strategy.reduce(getattr(norm, kind), reduce_op="mean")
                getattr(pl_module.get_submodule(name), kind).copy_(mean)


def _tracks(module: nn.Module) -> bool:
    return isinstance(module, BatchNorm) and bool(module.track_running_stats)


def _twin(trainer: Trainer, pl_module: LightningModule) -> LightningModule:
    """Returns a copy in evaluation mode that logs nothing, for this trainer."""
    twin: Any = copy.deepcopy(pl_module, {id(trainer): None})
    twin.trainer = trainer
    twin.eval()
    for name in ("log", "log_dict"):
        setattr(twin, name, _ignore)
    return twin


def _ignore(*args: object, **kwargs: object) -> None:
    """Stands in for `log`."""
