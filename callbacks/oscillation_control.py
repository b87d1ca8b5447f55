"""Weights that oscillate between two levels late in training: counted, dampened, frozen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_n2uq.callbacks._common import log_sink
from lightning_n2uq.callbacks._common.even_weights import ends, layers_with_even_weights
from lightning_n2uq.callbacks._common.loss_terms import LossTermHandle, attach_loss_term
from lightning_n2uq.callbacks._common.quantized_layers import QuantizedLayer
from lightning_n2uq.callbacks._common.timeline import check_interval, decay, steps_of
from lightning_n2uq.callbacks._oscillation.tracker import OscillationTracker
from lightning_n2uq.ops.dispatch import select
from lightning_n2uq.ops.weight import OP, weight_levels
from lightning_n2uq.quantizers import EntropyPreservingWeightQuantizer
from lightning_n2uq.quantizers.integers import WeightIntegers, weight_integers
from lightning_n2uq.utils.validation import check, check_integer, check_number

OSCILLATING = 0.005
"""Frequency above which a weight counts as oscillating in the log."""

_WITHIN = 0.4  # of the distance of two levels: how far from its level a frozen weight is moved to, at most


class OscillationControl(Callback):
    """Stops weights from flipping between two levels, by freezing those that do or by pulling all to levels.

    With straight-through gradients a weight near a decision threshold crosses it back and forth, late in
    training too: batch-norm statistics lag behind, and the network that is deployed is a random one of many.
    This is the remedy of Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022,
    arXiv 2203.11086: iterative weight freezing and the dampening loss. `BatchNormReestimation` is the third.
    Thresholds, `start` and `momentum` are by default those that the published code is called with at 4 bits.

    Freezing: after every optimizer step the frequency of each weight's oscillations is an exponential
    average; a weight above a threshold stays on the level where it was most of the time until the end of the
    run. The threshold falls from `freeze_above` to `freeze_above_end` between `start` and `end` along a
    cosine. What an optimizer does to a frozen weight is undone after every step. Where the scale of its
    levels moves so far that its level would become another, the weight follows just as far as it has to: the
    paper writes it onto its level instead, which a scale computed from the weights (`n2uq`, `statsq`) would
    answer by growing or shrinking from step to step.

    Dampening: `lambda * sum (w - w_q)^2` over all weights is added to the loss, `w_q` the quantized weight as
    a constant; weights beyond the ends of the range have no part in it. The gradient of `w` is
    `2 lambda (w - w_q)`. `lambda` rises from 0 to `dampening` between `start` and `end` along a cosine. The
    published code averages over each kernel by default, so that its values of `lambda` are larger.

    Logged every `log_every_n_steps` steps, as shares of the layer's weights: under
    `oscillation/<layer>/oscillating` those that are not frozen and oscillate in more than 0.5 % of the steps,
    under `oscillation/<layer>/frozen` the frozen ones. Over all layers: `oscillation/oscillating`,
    `oscillation/frozen`, `oscillation/freeze_above`, and `oscillation/dampening`, the penalty that was added
    to the loss.

    It works with weights on the nearest of evenly spaced levels: `n2uq`, `lsq`, `lsq_plus`, `statsq`,
    `least_error`, `seq`, `seq_ternary` and `binary`. Its state, eleven bytes per weight, is in checkpoints.

    Args:
        freeze_above: Frequency, in oscillations per step, above which a weight is frozen at first; None
            freezes none.
        freeze_above_end: What it has fallen to at `end`.
        dampening: The last weight `lambda` of the dampening loss; 0 leaves it out.
        start: Where both schedules begin.
        end: Where both schedules end.
        unit: The unit of `start` and `end`: `fraction` of the run, `epochs` or optimizer `steps`.
        momentum: Share of the newest step in the averages of frequency and level: about the inverse of the
            number of steps that they look back. A single oscillation raises the frequency by it, so that it
            may be at most half of `freeze_above_end`.
        layers: Shell patterns of layer names, for example `layer1.*`.
        log_every_n_steps: Optimizer steps between two logs; the first step is logged too.

    Raises:
        ValueError: A value is impossible; the message names the argument, the value and what is allowed.
    """

    def __init__(
        self,
        freeze_above: float | None = 0.1,
        freeze_above_end: float = 0.01,
        dampening: float = 0.0,
        start: float = 0.25,
        end: float = 1.0,
        unit: str = "fraction",
        momentum: float = 0.001,
        layers: tuple[str, ...] = ("*",),
        log_every_n_steps: int = 50,
    ) -> None:
        check_interval(start, end, unit)
        self.start, self.end, self.unit = start, end, unit
        self.momentum = check_number("momentum", momentum, 0, 1, above=True)
        self.dampening = check_number("dampening", dampening, 0)
        self.freeze_above = freeze_above
        self.freeze_above_end = check_number("freeze_above_end", freeze_above_end, 0, 1, above=True)
        if freeze_above is not None:
            check_number("freeze_above", freeze_above, freeze_above_end, 1)
            most = freeze_above_end / 2
            check(momentum <= most, "momentum", momentum, f"is at most half of freeze_above_end, {most:g}")
        self.patterns = tuple(layers)
        self.log_every_n_steps = check_integer("log_every_n_steps", log_every_n_steps, 1)
        self._layers: list[QuantizedLayer] = []
        self._trackers: dict[str, OscillationTracker] = {}
        self._held: dict[str, Tensor] = {}  # weights after the last step, of layers with frozen ones
        self._loaded: dict[str, Any] = {}
        self._steps_per_unit: float | None = None  # known from `on_train_start` on, or from a checkpoint
        self._last_step = -1
        self._trainer: Trainer | None = None
        self._handle: LossTermHandle | None = None
        self._penalty: Tensor | None = None

    @property
    def state_key(self) -> str:
        """Returns a key that tells callbacks on different layers apart."""
        return f"OscillationControl{self.patterns!r}"

    def _arguments(self) -> dict[str, Any]:
        names = ("freeze_above", "freeze_above_end", "dampening", "start", "end", "unit", "momentum")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Returns what is known of every weight, the schedule in steps, and the arguments it came from."""
        layers = {name: tracker.state_dict() for name, tracker in self._trackers.items()}
        return {"arguments": self._arguments(), "steps_per_unit": self._steps_per_unit, "layers": layers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a checkpoint; with changed arguments only its schedule is not kept."""
        self._loaded = dict(state_dict["layers"])
        if state_dict["arguments"] == self._arguments():
            self._steps_per_unit = state_dict["steps_per_unit"]
        else:
            rank_zero_warn("OscillationControl: arguments are not the checkpoint's, the new ones are used")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the layers, and adds the dampening loss, for training only."""
        if stage != "fit":
            return
        self._layers = layers_with_even_weights(pl_module, self.patterns, writable=True)
        self._trainer = trainer
        if self.dampening > 0:
            self._handle = attach_loss_term(pl_module, self._term)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fixes the schedule in steps, now that the length of the run is known, and begins to follow."""
        if self._steps_per_unit is None:
            self._steps_per_unit = steps_of(trainer, self.unit)
        self._last_step = trainer.global_step
        loaded, self._loaded = self._loaded, {}
        for layer in self._layers:
            if layer.name in loaded:
                state = loaded[layer.name]
                tracker = OscillationTracker.from_state(state, layer.weight.device)
                self._trackers[layer.name] = tracker
                if tracker.any_frozen:
                    self._held[layer.name] = layer.weight.detach().clone()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Takes the levels before the first step."""
        for layer in self._untracked():
            self._trackers[layer.name] = OscillationTracker(_codes(layer), _count(layer))
            self._held.pop(layer.name, None)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Follows the weights after an optimizer step, and puts frozen ones back."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        threshold = self.threshold(step)
        for layer in self._layers:
            self._follow(layer, threshold)
        if step == 1 or step % self.log_every_n_steps == 0:
            log_sink.log_metrics(trainer, self._metrics(threshold))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says how many weights are frozen."""
        frozen = sum(int(tracker.frozen.sum()) for tracker in self._trackers.values())
        total = sum(tracker.frozen.numel() for tracker in self._trackers.values())
        if self.freeze_above is not None:
            rank_zero_info(f"OscillationControl: {frozen} of {total} weights are frozen")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes the dampening from the loss."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Removes the dampening from the loss: Lightning calls no teardown after an error."""
        self._release()

    def threshold(self, step: int) -> float | None:
        """Returns the frequency above which weights are frozen at an optimizer step."""
        if self.freeze_above is None:
            return None
        left = self._left(step)
        return self.freeze_above_end + (self.freeze_above - self.freeze_above_end) * left

    def dampening_at(self, step: int) -> float:
        """Returns the weight of the dampening loss at an optimizer step."""
        return self.dampening * (1.0 - self._left(step))

    def penalty(self) -> Tensor:
        """Returns `sum (w - w_q)^2` over weights within their ranges, 0-d; the class tells its gradient."""
        terms = []
        for layer in self._layers:
            found, weight = _integers(layer), layer.weight
            low, high = ends(layer.weight_quantizer, found.odd)
            level = _scaled(found.integers, found, weight)
            outside = ((found.integers >= high) & (weight > level)) | (
                (found.integers <= low) & (weight < level)
            )
            terms.append((weight - level).masked_fill(outside, 0.0).square().sum())
        return torch.stack(terms).sum()

    def _left(self, step: int) -> float:
        if self._steps_per_unit is None:
            raise RuntimeError("the schedule is not known before training starts")
        return decay("cosine", step, self.start * self._steps_per_unit, self.end * self._steps_per_unit)

    def _term(self) -> Tensor | None:
        factor = self.dampening_at(self._trainer.global_step) if self._trainer else 0.0
        if factor == 0.0:
            self._penalty = None
            return None
        with torch.autocast(self._layers[0].weight.device.type, enabled=False):
            value = factor * self.penalty()
        self._penalty = value.detach()
        return value

    def _follow(self, layer: QuantizedLayer, threshold: float | None) -> None:
        """Takes a layer's weights after an optimizer step: puts frozen ones back, freezes others."""
        tracker, weight = self._trackers[layer.name], layer.weight
        held = self._held.get(layer.name)
        if held is not None:
            weight.copy_(torch.where(tracker.frozen, held, weight))
        codes = _codes(layer)
        tracker.update(codes, self.momentum, threshold)
        if tracker.any_frozen:
            _hold(layer, tracker, codes)
            self._held[layer.name] = weight.detach().clone() if held is None else held.copy_(weight)

    def _untracked(self) -> Iterator[QuantizedLayer]:
        """Yields layers that are not followed yet, or that have got another number of levels since."""
        for layer in self._layers:
            tracker = self._trackers.get(layer.name)
            if tracker is None or tracker.num_levels != _count(layer):
                yield layer

    def _metrics(self, threshold: float | None) -> dict[str, Tensor | float]:
        metrics: dict[str, Tensor | float] = {}
        totals: dict[str, Tensor | float] = {"oscillating": 0.0, "frozen": 0.0}
        count = sum(tracker.frozen.numel() for tracker in self._trackers.values())
        for name, tracker in self._trackers.items():
            shares = {
                "oscillating": tracker.share_above(OSCILLATING),
                "frozen": tracker.frozen.float().mean(),
            }
            for kind, share in shares.items():
                metrics[f"oscillation/{name}/{kind}"] = share
                totals[kind] = totals[kind] + share * (tracker.frozen.numel() / count)
        metrics |= {f"oscillation/{kind}": total for kind, total in totals.items()}
        if threshold is not None:
            metrics["oscillation/freeze_above"] = threshold
        if self.dampening > 0:
            metrics["oscillation/dampening"] = 0.0 if self._penalty is None else self._penalty
        return metrics

    def _release(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._trainer = None


def _integers(layer: QuantizedLayer) -> WeightIntegers:
    quantizer = layer.weight_quantizer
    found = None if quantizer is None else weight_integers(quantizer, layer.weight.detach())
    if found is None:
        raise TypeError(f"{layer.name} has no weights on evenly spaced levels")
    return found


def _count(layer: QuantizedLayer) -> int:
    return layer.weight_quantizer.num_levels if layer.weight_quantizer is not None else 0


def _codes(layer: QuantizedLayer) -> Tensor:
    """Returns the level index of every weight from 0, uint8; of N2UQ's from the kernel that training uses."""
    quantizer: Any = layer.weight_quantizer
    weight = layer.weight.detach()
    fast = isinstance(quantizer, EntropyPreservingWeightQuantizer) and quantizer.rescale
    if not fast or quantizer.bits > 7 or weight.dtype != torch.float32:
        codes: Tensor = quantizer.codes(weight)
        return codes
    integers, _ = weight_levels(weight, quantizer.bits, select(OP, weight.device))
    return (integers.view(torch.uint8) + (quantizer.num_levels - 1)) >> 1  # adds modulo 256


def _hold(layer: QuantizedLayer, tracker: OscillationTracker, codes: Tensor) -> None:
    """Moves frozen weights back towards the level that they have to be on, where they are on another one."""
    astray = tracker.frozen & (codes != tracker.levels)
    if not bool(astray.any()):
        return
    found, weight = _integers(layer), layer.weight
    low, _ = ends(layer.weight_quantizer, found.odd)
    distance = 2 if found.odd else 1
    level = _scaled(tracker.levels.to(torch.int16) * distance + low, found, weight)
    within = _scaled(torch.full_like(found.integers, distance), found, weight) * _WITHIN
    moved = torch.minimum(torch.maximum(weight, level - within), level + within)
    weight.copy_(torch.where(astray, moved, weight))


def _scaled(integers: Tensor, found: WeightIntegers, weight: Tensor) -> Tensor:
    scale = found.scale.reshape(-1, *(1,) * (weight.dim() - 1))
    return (integers * scale).to(weight.dtype)
