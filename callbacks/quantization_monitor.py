"""Watch what every layer's quantizer is doing: numbers, histograms, figures, and files for a report."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_n2uq.callbacks._common import log_sink
from lightning_n2uq.callbacks._common.activation_inputs import ActivationInputs
from lightning_n2uq.callbacks._common.quantized_layers import matching_layers
from lightning_n2uq.callbacks._monitor import files, media
from lightning_n2uq.callbacks._monitor.layer_recorder import LayerRecorder
from lightning_n2uq.layers.integer import by_reason, float_reason
from lightning_n2uq.report.layer_record import LayerRecord, mean_metrics
from lightning_n2uq.utils.validation import check_integer

_LONGEST_HISTORY = 512


class QuantizationMonitor(Callback):
    """Logs, per layer, what is needed to see a dead level, a collapsed threshold or oscillating weights.

    Scalars under `quant/<layer>/`, to every logger of the run: `threshold_<k>`, `smallest_width`,
    `widths_at_floor` (widths that no gradient moves any more), `scale_in`, `scale_out`, `weight_scale`;
    for weights and for activations `.._usage_<level>`, `.._entropy` (bits), `.._dead_levels` (never used
    in the sample); `weight_clipped`, `activation_clipped_low`, `activation_clipped_high` (shares at the
    ends of the range); `weight_changed` (share of weights on another level than at the last log: those
    that oscillate do not stop changing late in training; Nagel et al., "Overcoming Oscillations in
    Quantization-Aware Training", ICML 2022, arXiv 2203.11086). Means over layers under `quant/mean_..`, and
    `speed/steps_per_second` since the last log in the epoch.

    W&B also gets the step axis of all families, the code version, histograms of the inputs every epoch,
    a table of layers at the end, and figures: per layer the staircase over the surrogate with the inputs'
    histogram beneath, level usage, entropy by layer and step. TensorBoard gets the figures.

    Files: `quantization.jsonl` (a snapshot per epoch) and `confusion.json`, from which `n2uq report`
    draws its page.

    At the first logged step the log says which layers train in floats and why (`training in floats: ...`).

    Between logs the callback only compares two integers; a log costs one device transfer, and with several
    processes one reduction, so that rank 0 logs counts over all ranks' inputs.

    Args:
        every_n_steps: Optimizer steps between two logs; the first step and the last of every epoch are
            logged too.
        layers: Shell patterns of the names of the layers to watch.
        max_samples: The largest number of a layer's inputs, per rank, that a log looks at.
        figures_every_n_epochs: Epochs between two drawings for loggers that show figures; 0 draws only at the
            end.
        dirpath: The folder for the files; None takes the run's folder, which is the first logger's.

    Raises:
        ValueError: A value is impossible; the message names the argument, the value and what is allowed.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        layers: tuple[str, ...] = ("*",),
        max_samples: int = 65536,
        figures_every_n_epochs: int = 0,
        dirpath: str | None = None,
    ) -> None:
        self.every_n_steps = check_integer("every_n_steps", every_n_steps, 1)
        self.patterns = tuple(layers)
        self.figures_every_n_epochs = check_integer("figures_every_n_epochs", figures_every_n_epochs, 0)
        self.dirpath = dirpath
        self.records: list[LayerRecord] = []
        self._inputs = ActivationInputs(check_integer("max_samples", max_samples, 1))
        self._recorder = LayerRecorder([])
        self._folder = Path()
        self._history: list[tuple[int, list[float]]] = []  # step, weight entropies
        self._written_step = -1
        self._told = False  # of layers that are not called, and of those that train in floats
        self._resumed = False
        self._clock = (0, 0.0)  # optimizer steps and seconds at the last log in this epoch

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to log and write what an uninterrupted one would."""
        return {
            "history": self._history,
            "written_step": self._written_step,
            "records": [asdict(record) for record in self.records],
            "codes": self._recorder.codes(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores that; older checkpoints hold the history only."""
        self._history = [(step, list(values)) for step, values in state_dict["history"]]
        self._written_step = state_dict.get("written_step", -1)
        self.records = [LayerRecord.from_dict(record) for record in state_dict.get("records", [])]
        self._recorder.load_codes(state_dict.get("codes", {}))
        self._resumed = "written_step" in state_dict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the layers and the folder, and tells W&B the step axis."""
        self._folder = files.run_folder(trainer, self.dirpath)
        if stage == "fit":
            self._recorder = LayerRecorder(matching_layers(pl_module, self.patterns, "layers"))
            if not getattr(trainer, "fast_dev_run", False):
                media.define_run(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drops snapshots that the interrupted run wrote after its checkpoint: they are written again."""
        if self._resumed and trainer.is_global_zero:
            files.drop_snapshots_after(self._folder, self._written_step)
        self._resumed = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock; validation between epochs does not count."""
        self._clock = (trainer.global_step, time.perf_counter())

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Watches the inputs of a step that will be logged."""
        if self._wanted(trainer, trainer.global_step):
            self._inputs.watch(self._recorder.layers)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Measures and logs."""
        step = trainer.global_step - 1  # -1 while the first batches accumulate
        recorded = self._history[-1][0] if self._history else -1
        if not self._inputs.items() or step <= recorded or not self._wanted(trainer, step):
            return
        self._measure(trainer)
        self._tell_once()
        self._inputs.close()
        self._remember(step)
        log_sink.log_metrics(trainer, self._metrics() | self._speed(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the snapshot, and draws where it is time."""
        if self._history and self._written_step < self._history[-1][0] and self.records:
            self._written_step = self._history[-1][0]
            if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
                epoch = trainer.current_epoch
                files.append_snapshot(self._folder, self._written_step, epoch, self.records)
            media.log_histograms(trainer, self.records)
        every = self.figures_every_n_epochs
        if every and (trainer.current_epoch + 1) % every == 0:
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sends figures and the table of layers."""
        if self.records:
            self._draw(trainer)
            media.log_table(trainer, self.records)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the confusion matrix."""
        if not trainer.sanity_checking and not getattr(trainer, "fast_dev_run", False):
            files.write_confusion(trainer, pl_module, "val", self._folder)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the confusion matrix."""
        if not getattr(trainer, "fast_dev_run", False):
            files.write_confusion(trainer, pl_module, "test", self._folder)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes the hooks."""
        self._inputs.close()

    def _wanted(self, trainer: Trainer, step: int) -> bool:
        return step == 0 or (step + 1) % self.every_n_steps == 0 or trainer.is_last_batch

    def _measure(self, trainer: Trainer) -> None:
        def total(counts: Tensor) -> Tensor:
            summed: Tensor = trainer.strategy.reduce(counts, reduce_op="sum")
            return summed

        inputs = {layer.name: x for layer, x in self._inputs.items()}
        with torch.autocast(trainer.strategy.root_device.type, enabled=False):
            self.records = self._recorder.measure(inputs, total if trainer.world_size > 1 else None)

    def _tell_once(self) -> None:
        """Names the layers that count as quantized and were not called, and those that train in floats."""
        if self._told:
            return
        self._told = True
        if names := self._inputs.uncalled(self._recorder.layers):
            rank_zero_warn(
                f"QuantizationMonitor: {', '.join(names)}: not called in this step; what reads such a "
                "layer's weight without calling the layer reads floats"
            )
        shapes = self._inputs.shapes
        called = [layer for layer in self._recorder.layers if layer.name in shapes and layer.weight_quantizer]
        reasons = [(layer.name, float_reason(layer.module, shapes[layer.name])) for layer in called]
        for line in by_reason((name, reason) for name, reason in reasons if reason is not None):
            rank_zero_info(f"training in floats: {line}")

    def _metrics(self) -> dict[str, float]:
        metrics = mean_metrics(self.records)
        for record in self.records:
            metrics |= record.metrics()
        return metrics

    def _speed(self, trainer: Trainer) -> dict[str, float]:
        steps, seconds = self._clock
        self._clock = (trainer.global_step, time.perf_counter())
        rate = (self._clock[0] - steps) / max(self._clock[1] - seconds, 1e-9)
        return {"speed/steps_per_second": rate}

    def _remember(self, step: int) -> None:
        self._history.append((step, [r.scalars().get("weight_entropy", 0.0) for r in self.records]))
        if len(self._history) > _LONGEST_HISTORY:
            del self._history[1:-1:2]  # the ends stay, every other one in between goes

    def _draw(self, trainer: Trainer) -> None:
        if not media.takes_images(trainer) or not self.records:
            return
        if getattr(trainer, "fast_dev_run", False):
            return
        from lightning_n2uq.callbacks._monitor import figures

        for record in self.records:
            if record.activation is not None:
                drawn = figures.staircase_figure(record.name, record.activation)
                media.log_figure(trainer, f"quant/{record.name}/staircase", drawn)
        media.log_figure(trainer, "quant/usage", figures.usage_figure(self.records))
        steps = [step for step, _ in self._history]
        values = [row for _, row in self._history]
        names = [record.name for record in self.records]
        media.log_figure(trainer, "quant/entropy", figures.entropy_map(names, steps, values))
