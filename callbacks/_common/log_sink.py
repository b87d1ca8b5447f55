"""Sends the callbacks' scalars to every logger of the run, from rank 0, with one device transfer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer
from torch import Tensor


def to_floats(metrics: Mapping[str, Tensor | float | int]) -> dict[str, float]:
    """Returns scalars as Python floats; tensors are fetched together, so that a device is waited for once."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    values = torch.stack([v.detach().double() for v in _same_device(tensors)]).tolist() if tensors else []
    fetched = dict(zip(tensors, values, strict=True))
    return {name: fetched[name] if name in fetched else float(value) for name, value in metrics.items()}


def _same_device(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    devices = [value.device for value in tensors.values()]
    device = next((d for d in devices if d.type != "cpu"), devices[0])
    return [value.to(device, non_blocking=True) for value in tensors.values()]


def last_step(trainer: Trainer) -> int:
    """Returns the index of the optimizer step just taken, from 0, as Lightning logs it."""
    return max(trainer.global_step - 1, 0)


def log_metrics(trainer: Trainer, metrics: Mapping[str, Tensor | float | int]) -> None:
    """Sends scalars to every logger at the step just taken, from rank 0.

    They bypass `LightningModule.log`, whose bookkeeping per value would cost more than computing hundreds
    of them, and which could not reduce them as counts. Values are expected to be equal on all ranks, or
    reduced already.
    """
    if not trainer.is_global_zero or not trainer.loggers:
        return
    values = to_floats(metrics)
    for logger in trainer.loggers:
        logger.log_metrics(values, step=last_step(trainer))
