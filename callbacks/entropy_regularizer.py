"""A penalty that keeps the entropy of quantized weights and activations high."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_n2uq.callbacks._common import log_sink
from lightning_n2uq.callbacks._common.activation_inputs import ActivationInputs
from lightning_n2uq.callbacks._common.loss_terms import LossTermHandle, attach_loss_term
from lightning_n2uq.callbacks._common.quantized_layers import QuantizedLayer, matching_layers
from lightning_n2uq.callbacks._common.timeline import check_interval, decay, steps_of
from lightning_n2uq.ops.entropy import entropy_bits, hard_histogram, soft_histogram
from lightning_n2uq.quantizers import EntropyPreservingWeightQuantizer, Quantizer
from lightning_n2uq.quantizers.positions import level_position
from lightning_n2uq.utils.validation import check_choice, check_integer, check_number

_SCHEDULES = ("constant", "linear", "cosine", "exponential")


class EntropyRegularizer(Callback):
    """Penalty `weight * sum_l (bits_l - H(W_l))` on the entropy of quantized weights, in bits.

    `H` in the penalty is that of a soft histogram (`ops.entropy.soft_histogram`) over the layer's levels, so
    that its gradient moves weights towards levels that are used too little; it flows through the scale as
    well, so that merely growing weights gains nothing. The penalty is added to the loss that `training_step`
    returns (`attach_loss_term` says how it is averaged, accumulated and scaled) and computed in float32
    whatever the precision. With several processes each adds the same term for its equal weights; the term
    for activations is that of the process's own batch.

    Logged every `log_every_n_steps` steps: `entropy/<layer>/weight` and (with a weight for them)
    `entropy/<layer>/activation`, the entropy of the hard codes in bits, their means over layers
    `entropy/mean_weight`, `entropy/mean_activation`, and `entropy/penalty`, what was added to the loss.

    Args:
        weight: The weight of the penalty on weights; 0 for no penalty.
        activation_weight: The weight of the same penalty on activation codes; 0 for no penalty.
        layers: Shell patterns of the layers that the penalties are summed over.
        schedule: The factor on both weights: `constant`, or from 0 at `start` to 1 at `end` along `linear`,
            `cosine` or `exponential` (late and steep).
        start: Where the factor leaves 0.
        end: Where the factor reaches 1.
        unit: The unit of `start` and `end`: `fraction` of the run, `epochs` or optimizer `steps`.
        softness: The ramp width of the soft histogram, above 0 to 1: 1 interpolates between levels, smaller
            values are nearer to the hard histogram, with gradients for fewer weights.
        no_rescale: Shell patterns of layers whose weights are scaled by `max |W|` instead of the
            entropy-preserving scale (N2UQ, section 3), for ablations. Checkpoints keep it.
        max_samples: The largest number of a layer's inputs per step that the activation penalty looks at.
        log_every_n_steps: Optimizer steps between two logs; the first step is logged too.

    Raises:
        ValueError: A value is impossible; the message names the argument, the value and what is allowed.
    """

    def __init__(
        self,
        weight: float = 0.0,
        activation_weight: float = 0.0,
        layers: tuple[str, ...] = ("*",),
        schedule: str = "constant",
        start: float = 0.0,
        end: float = 0.5,
        unit: str = "fraction",
        softness: float = 1.0,
        no_rescale: tuple[str, ...] = (),
        max_samples: int = 16384,
        log_every_n_steps: int = 50,
    ) -> None:
        check_interval(start, end, unit)
        self.weight = check_number("weight", weight, 0)
        self.activation_weight = check_number("activation_weight", activation_weight, 0)
        self.patterns, self.no_rescale = tuple(layers), tuple(no_rescale)
        self.schedule = check_choice("schedule", schedule, _SCHEDULES)
        self.start, self.end, self.unit = start, end, unit
        self.softness = check_number("softness", softness, 0, 1, above=True)
        self.log_every_n_steps = check_integer("log_every_n_steps", log_every_n_steps, 1)
        self._inputs = ActivationInputs(check_integer("max_samples", max_samples, 1), keep_graph=True)
        self._layers: list[QuantizedLayer] = []
        self._plain: list[EntropyPreservingWeightQuantizer] = []
        self._handle: LossTermHandle | None = None
        self._trainer: Trainer | None = None
        self._steps_per_unit = 0.0
        self._last_step = -1
        self._penalty: Tensor | None = None

    @property
    def state_key(self) -> str:
        """Returns a key that tells regularizers of different layers apart."""
        return f"EntropyRegularizer{self.patterns!r}{self.no_rescale!r}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the layers, switches their scales and adds the penalty to the loss, for training only."""
        if stage != "fit":
            return
        self._layers = matching_layers(pl_module, self.patterns, "layers")
        plain = matching_layers(pl_module, self.no_rescale, "no_rescale") if self.no_rescale else []
        for layer in plain:
            if not isinstance(layer.weight_quantizer, EntropyPreservingWeightQuantizer):
                raise ValueError(f"no_rescale: {layer.name} has no weight quantizer 'n2uq' to switch")
        self._plain = [layer.weight_quantizer for layer in plain]  # type: ignore[misc]
        self._switch_scales()
        if self.weight > 0 or self.activation_weight > 0:
            self._handle = attach_loss_term(pl_module, self._term)
            self._trainer = trainer

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switches the scales again: a state dict loaded since `setup` brings its own switches."""
        self._switch_scales()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the length of the run, for the schedule."""
        self._steps_per_unit = 0.0 if self.schedule == "constant" else steps_of(trainer, self.unit)
        self._last_step = trainer.global_step  # a resumed run has logged it, maybe amid accumulated batches

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Watches the layers' inputs where the penalty or the log needs them."""
        if self.activation_weight > 0:
            self._inputs.watch(self._layers)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Logs after the first optimizer step and then once per interval."""
        step = trainer.global_step
        wanted = step == 1 or (step > 0 and step % self.log_every_n_steps == 0)
        if wanted and step != self._last_step:
            self._last_step = step
            log_sink.log_metrics(trainer, self._metrics())
        self._inputs.clear()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes the penalty from the loss."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Removes the penalty from the loss: Lightning calls no teardown after an error."""
        self._release()

    def factor(self, step: int) -> float:
        """Returns the factor on both weights at an optimizer step."""
        if self.schedule == "constant":
            return 1.0
        begin, end = self.start * self._steps_per_unit, self.end * self._steps_per_unit
        # The decay from 1 to 0, run backwards: a ramp from 0 to 1 that is steep at its end.
        return decay(self.schedule, round(begin + end - step), begin, end) if step > begin else 0.0

    def penalty(self) -> Tensor:
        """Returns `weight * sum (bits - H(W)) + activation_weight * sum (bits - H(x))`, 0-d."""
        terms = []
        for layer in self._layers:
            quantizer = layer.weight_quantizer
            if self.weight > 0 and quantizer is not None:
                terms.append(self.weight * self._missing_bits(quantizer, layer.weight))
        for layer, x in self._inputs.items():
            terms.append(self.activation_weight * self._missing_bits(layer.activation_quantizer, x))
        if not terms:
            raise ValueError("layers: none of the chosen layers has a quantizer to regularize")
        return torch.stack(terms).sum()

    def _term(self) -> Tensor | None:
        factor = self.factor(self._trainer.global_step) if self._trainer else 0.0
        if factor == 0.0:
            self._penalty = None
            return None
        device = next(self._layers[0].module.parameters()).device.type
        with torch.autocast(device, enabled=False):
            value = factor * self.penalty()
        self._penalty = value.detach()
        return value

    def _missing_bits(self, quantizer: Quantizer | None, x: Tensor) -> Tensor:
        if quantizer is None:
            return x.new_zeros(())
        counts = soft_histogram(level_position(quantizer, x), quantizer.num_levels, self.softness)
        return quantizer.bits - entropy_bits(counts)

    @torch.no_grad()
    def _metrics(self) -> dict[str, Tensor]:
        weights = {x.name: _entropy(x.weight_quantizer, x.weight) for x in self._layers if x.weight_quantizer}
        inputs = {x.name: _entropy(x.activation_quantizer, values) for x, values in self._inputs.items()}
        metrics = {f"entropy/{name}/weight": value for name, value in weights.items()}
        metrics |= {f"entropy/{name}/activation": value for name, value in inputs.items()}
        for kind, values in (("weight", weights), ("activation", inputs)):
            if values:
                metrics[f"entropy/mean_{kind}"] = torch.stack(list(values.values())).mean()
        metrics["entropy/penalty"] = torch.zeros(()) if self._penalty is None else self._penalty
        return metrics

    def _switch_scales(self) -> None:
        for quantizer in self._plain:
            quantizer.rescale = False

    def _release(self) -> None:
        self._inputs.close()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._trainer = None


def _entropy(quantizer: Quantizer | None, x: Tensor) -> Tensor:
    """Returns the entropy of the hard codes in bits, 0-d float64."""
    if quantizer is None:
        return torch.zeros((), dtype=torch.float64)
    return entropy_bits(hard_histogram(quantizer.codes(x.detach()), quantizer.num_levels))
