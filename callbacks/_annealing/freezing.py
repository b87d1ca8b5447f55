"""Frozen thresholds and plain averages of batch-norm statistics, for the last part of training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_n2uq.utils.compat import BatchNorm

_THRESHOLD_PARAMETERS = ("start", "widths", "scale_in", "offset")  # the last of a converted layer


def drop_gradients(quantizers: Iterable[nn.Module | None]) -> None:
    """Sets the gradients of what decides a threshold to None, after the backward pass.

    `requires_grad = False` would leave DDP waiting for gradients that never come, and a gradient of zero
    would still move a parameter by momentum or weight decay. The output scale stays free.
    """
    for quantizer in quantizers:
        for name in _THRESHOLD_PARAMETERS:
            parameter = getattr(quantizer, name, None)
            if parameter is not None:
                parameter.grad = None


class BatchNormAverages:
    """Turns running statistics into plain averages since the last restart (`momentum=None` of torch).

    With thresholds frozen and the staircase in use, they become the statistics of the deployed network,
    without a further pass over the data; the count of averaged batches is in the checkpoint.
    """

    def __init__(self) -> None:
        self._momenta: dict[Any, float | None] = {}  # by batch norm

    @property
    def active(self) -> bool:
        """Returns whether statistics are plain averages at the moment."""
        return bool(self._momenta)

    def restart(self, model: nn.Module) -> None:
        """Forgets the statistics of `model` and averages from now on."""
        self.resume(model)
        for module in self._momenta:
            module.reset_running_stats()

    def resume(self, model: nn.Module) -> None:
        """Continues to average where statistics loaded from a checkpoint left off."""
        norms: list[Any] = [module for module in model.modules() if isinstance(module, BatchNorm)]
        for norm in norms:
            if norm.track_running_stats:
                self._momenta.setdefault(norm, norm.momentum)
                norm.momentum = None

    def release(self) -> None:
        """Gives the layers their momentum back; the statistics stay."""
        for module, momentum in self._momenta.items():
            module.momentum = momentum
        self._momenta.clear()
