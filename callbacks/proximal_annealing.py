"""PARQ: weights move from full precision to their levels by a schedule, as a proximal map."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_n2uq.callbacks._annealing.pulling import Pull
from lightning_n2uq.callbacks._common.even_weights import layers_with_even_weights
from lightning_n2uq.callbacks._common.timeline import check_interval, steps_of
from lightning_n2uq.utils.validation import check


def inverse_slope(done: float, steepness: float) -> float:
    """Returns the sigmoid-like curve from 1 at `done` 0 to 0 at `done` 1.

    Args:
        done: The share of the interval, 0 to 1.
        steepness: How fast it falls in the middle; near 0 it is a straight line.
    """
    value, first, last = (1 / (1 + math.exp(steepness * (x - 0.5))) for x in (done, 0.0, 1.0))
    return (value - last) / (first - last)


class ProximalAnnealing(Callback):
    """Pulls weights to the levels of their quantizers, by PARQ's piecewise-affine proximal map.

    In training the weight in the forward pass is the map's value: the weight itself at the inverse slope 1,
    its nearest level at 0, in between on the levels or on the way to them. The optimizer goes on with the
    full-precision weights, whose gradient is that of the quantizer: the paper's averaged proximal gradient
    method (AProx) in the limit of its practice, without the shrinkage by the accumulated rate. Evaluation and
    export always use the levels. See Jin et al., "PARQ: Piecewise-Affine Regularized Quantization", ICML
    2025, arXiv 2503.15748.

    It works with the weight quantizers `n2uq`, `lsq`, `lsq_plus`, `statsq`, `least_error`, `seq`,
    `seq_ternary` and `binary`, whose values are the nearest of evenly spaced levels.

    Args:
        start: Where the inverse slope leaves 1.
        end: Where it reaches 0; from there on the quantizers are as they are without this callback.
        unit: The unit of `start` and `end`: `fraction` of the run, `epochs` or optimizer `steps`.
        steepness: The steepness of the sigmoid-like curve from 1 to 0, a positive number.
        layers: Shell patterns of layer names, for example `layer1.*`.

    Raises:
        ValueError: A value is impossible; the message names the argument, the value and what is allowed.
    """

    def __init__(
        self,
        start: float = 0.0,
        end: float = 0.5,
        unit: str = "fraction",
        steepness: float = 10.0,
        layers: tuple[str, ...] = ("*",),
    ) -> None:
        check_interval(start, end, unit)
        check(0 < steepness < 1000, "steepness", steepness, "is a positive number below 1000")
        self.start, self.end, self.unit, self.steepness = start, end, unit, steepness
        self.patterns = tuple(layers)
        self._quantizers: list[nn.Module] = []
        self._hooks: list[RemovableHandle] = []
        self._pull = Pull()
        self._steps_per_unit: float | None = None  # known from `on_train_start` on, or from a checkpoint

    @property
    def state_key(self) -> str:
        """Returns a key that tells callbacks on different layers apart."""
        return f"ProximalAnnealing{self.patterns!r}"

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("start", "end", "unit", "steepness")}

    def state_dict(self) -> dict[str, Any]:
        """Returns the schedule in optimizer steps, and the arguments it came from."""
        return {"arguments": self._arguments(), "steps_per_unit": self._steps_per_unit}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the schedule of the interrupted run, unless the arguments were changed since."""
        if state_dict["arguments"] == self._arguments():
            self._steps_per_unit = state_dict["steps_per_unit"]
        else:
            rank_zero_warn("ProximalAnnealing: arguments are not the checkpoint's, the new ones are used")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the weight quantizers."""
        layers = layers_with_even_weights(pl_module, self.patterns)
        self._quantizers = [layer.weight_quantizer for layer in layers if layer.weight_quantizer is not None]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fixes the schedule in steps, now that the length of the run is known."""
        if self._steps_per_unit is None:
            self._steps_per_unit = steps_of(trainer, self.unit)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Sets the inverse slope of this optimizer step."""
        self._pull.inverse_slope = slope = self.slope_at(trainer.global_step)
        if slope and not self._hooks:
            self._hooks = [one.register_forward_hook(self._pull) for one in self._quantizers]
        elif not slope:
            self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the quantizers as they are deployed."""
        self._release()

    def slope_at(self, step: int) -> float:
        """Returns the inverse slope at an optimizer step, once the run's length is known."""
        if self._steps_per_unit is None:
            raise RuntimeError("the schedule is not known before training starts")
        begin, end = self.start * self._steps_per_unit, self.end * self._steps_per_unit
        if step >= end:
            return 0.0
        return 1.0 if step <= begin else inverse_slope((step - begin) / (end - begin), self.steepness)

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
