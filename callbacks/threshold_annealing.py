"""Annealing of quantizers from the surrogate to the hard staircase and from many bits to few."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_n2uq.callbacks._annealing import bit_schedule, freezing
from lightning_n2uq.callbacks._annealing.averaging import refuse_averaging
from lightning_n2uq.callbacks._common.quantized_layers import QuantizedLayer, matching_layers
from lightning_n2uq.callbacks._common.timeline import CURVES, check_interval, check_point, decay, steps_of
from lightning_n2uq.quantizers import LearnableThresholdQuantizer
from lightning_n2uq.utils.validation import check_choice

_ORDERS = ("together", "input_to_output")
_GRADIENTS = ("surrogate", "ramp")


class ThresholdAnnealing(Callback):
    """Anneals the ramp width `u` of learned-threshold quantizers from 1 (surrogate) to 0 (staircase).

    In training the quantizer's value is `r_u` of the thresholds: the surrogate `h` at `u = 1`, the deployed
    staircase at `u = 0`. Validation, test and export always use the staircase, so that the metric is that of
    the deployed network (and is low while `u` is large). Layers can be annealed one after the other from the
    input to the output, since a layer should be annealed when the ones before it are (Spallanzani et al.,
    "Training Quantised Neural Networks with STE Variants: the Additive Noise Annealing Algorithm", arXiv
    2203.11323).

    Args:
        start: Where `u` leaves 1.
        end: Where `u` reaches 0.
        unit: The unit of `start`, `end`, `freeze_after` and `bits_at`: `fraction` of the run, `epochs` or
            optimizer `steps`.
        schedule: The curve from 1 to 0: `linear`, `cosine` or `exponential`.
        order: `together`, or `input_to_output`: each layer takes half of the interval, the first layer the
            first half, the last layer the last half, the others in between.
        gradient: `surrogate` takes the gradient of `h`, whatever `u` is (generalized straight-through);
            `ramp` takes that of `r_u` itself while `u > 0`, which fewer and fewer inputs then carry.
        layers: Shell patterns of layer names, for example `layer1.*`.
        freeze_after: From where thresholds and input scales no longer change, and batch-norm statistics are
            estimated anew in every epoch as plain averages over it; None for never.
        bits: Bit widths in order, for example `[8, 4, 2]`, of which the last has to be the network's own.
            Thresholds of the finer quantizer are mapped onto the coarser one (`map_thresholds`), and
            `ModelCheckpoint` forgets what was best at another width. None keeps the width.
        bits_at: Where each of `bits` begins: the first at 0, then increasing.
        bits_of: Whose width changes: `activations`, `weights` or `both`.

    Raises:
        ValueError: A value is impossible; the message names the argument, the value and what is allowed.
    """

    def __init__(
        self,
        start: float = 0.0,
        end: float = 0.5,
        unit: str = "fraction",
        schedule: str = "linear",
        order: str = "together",
        gradient: str = "surrogate",
        layers: tuple[str, ...] = ("*",),
        freeze_after: float | None = None,
        bits: tuple[int, ...] | None = None,
        bits_at: tuple[float, ...] | None = None,
        bits_of: str = "both",
    ) -> None:
        check_interval(start, end, unit)
        check_choice("schedule", schedule, CURVES)
        check_choice("order", order, _ORDERS)
        check_choice("gradient", gradient, _GRADIENTS)
        if freeze_after is not None and check_point("freeze_after", freeze_after, unit) < end:
            raise ValueError(f"freeze_after: got {freeze_after}, allowed is end ({end}) or later")
        self.start, self.end, self.unit, self.schedule = start, end, unit, schedule
        self.order, self.gradient, self.patterns = order, gradient, tuple(layers)
        self.freeze_after = freeze_after
        self.bits = bit_schedule.BitSchedule.build(bits, bits_at, bits_of, unit, freeze_after)
        self._layers: list[QuantizedLayer] = []
        self._steps_per_unit: float | None = None  # known from `on_train_start` on, or from a checkpoint
        self._last_step = -1
        self._batch_norms = freezing.BatchNormAverages()
        self._was_averaging = False
        self._load_hook: Any = None

    @property
    def state_key(self) -> str:
        """Returns a key that tells annealings of different layers apart."""
        return f"ThresholdAnnealing{self.patterns!r}"

    def _arguments(self) -> dict[str, Any]:
        names = ("start", "end", "unit", "schedule", "order", "freeze_after")
        return {**{name: getattr(self, name) for name in names}, "bits": self.bits.as_dict()}

    def state_dict(self) -> dict[str, Any]:
        """Returns the schedule in optimizer steps, the arguments it came from, and whether norms average."""
        schedule = {"arguments": self._arguments(), "steps_per_unit": self._steps_per_unit}
        return {**schedule, "averaging": self._batch_norms.active}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the schedule of the interrupted run, unless the arguments were changed since."""
        if state_dict["arguments"] == self._arguments():
            self._steps_per_unit = state_dict["steps_per_unit"]
            self._was_averaging = state_dict["averaging"]
        else:
            rank_zero_warn("ThresholdAnnealing: arguments are not the checkpoint's, the new ones are used")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the layers; with a bit schedule, lets checkpoints of every width be loaded."""
        layers = matching_layers(pl_module, self.patterns, "layers")
        self._layers = [x for x in layers if isinstance(x.activation_quantizer, LearnableThresholdQuantizer)]
        if not self._layers:
            raise ValueError("layers: none of the chosen layers has a learned-threshold quantizer ('n2uq')")
        if self.bits.widths:
            self._load_hook = bit_schedule.follow_checkpoints(pl_module, self._layers, self.bits.target)
            if stage == "fit":
                refuse_averaging(trainer.callbacks)  # type: ignore[attr-defined]
                self.bits.check_last(self._layers)
                self.bits.apply(self._layers, self.bits.widths[0])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fixes the schedule in steps, now that the length of the run is known."""
        if self._steps_per_unit is None:
            self._steps_per_unit = steps_of(trainer, self.unit)
        if self._was_averaging:  # in the middle of an epoch nothing else resumes it
            self._batch_norms.resume(pl_module)
            self._was_averaging = False
        self._last_step = -1

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restarts batch-norm statistics with every epoch once thresholds are frozen."""
        if self._frozen(trainer.global_step):
            self._batch_norms.restart(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Sets `u` and the bit width for this optimizer step; does nothing between its micro-batches."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        if self.bits.widths:
            self._set_bits(trainer, pl_module, self.bits.width_at(step, self._unit_steps()))
        for layer, ramp in zip(self._layers, self.ramps(step), strict=True):
            quantizer = layer.activation_quantizer
            quantizer.ramp, quantizer.ramp_gradient = ramp, self.gradient == "ramp"  # type: ignore[union-attr]
        if self._frozen(step) and not self._batch_norms.active:
            self._batch_norms.restart(pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Removes the gradients of frozen thresholds, so that the optimizer leaves them alone."""
        if self._frozen(trainer.global_step):
            wrapped = [getattr(layer.module, "activation_quantizer", None) for layer in self._layers]
            freezing.drop_gradients([*wrapped, *(layer.activation_quantizer for layer in self._layers)])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves quantizers as they are deployed, and removes hooks."""
        for layer in self._layers:
            layer.activation_quantizer.ramp = 0.0  # type: ignore[union-attr]
        self._batch_norms.release()
        if self._load_hook is not None:
            self._load_hook.remove()
            self._load_hook = None

    def ramps(self, step: int) -> list[float]:
        """Returns `u` of every annealed layer at an optimizer step, once the run's length is known."""
        per_unit = self._unit_steps()
        begin, end = self.start * per_unit, self.end * per_unit
        count = len(self._layers)
        if self.order == "together" or count == 1:
            return [decay(self.schedule, step, begin, end)] * count
        half = (end - begin) / 2
        begins = [begin + half * i / (count - 1) for i in range(count)]
        return [decay(self.schedule, step, first, first + half) for first in begins]

    def _unit_steps(self) -> float:
        if self._steps_per_unit is None:
            raise RuntimeError("the schedule is not known before training starts")
        return self._steps_per_unit

    def _frozen(self, step: int) -> bool:
        return self.freeze_after is not None and step >= self.freeze_after * self._unit_steps()

    def _set_bits(self, trainer: Trainer, pl_module: LightningModule, width: int) -> None:
        replaced = self.bits.apply(self._layers, width)
        if replaced is None:
            return
        bit_schedule.tell_trainer(trainer, pl_module, replaced)
        rank_zero_info(
            f"ThresholdAnnealing: {width} bits ({self.bits.of}) from step {trainer.global_step} on"
        )
