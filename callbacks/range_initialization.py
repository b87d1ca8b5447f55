"""Input ranges of learned thresholds from the first training batch."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_n2uq.callbacks._common.quantized_layers import matching_layers
from lightning_n2uq.convert.method_ranges import set_method_range
from lightning_n2uq.ops.tables import output_step
from lightning_n2uq.quantizers import LearnableThresholdQuantizer
from lightning_n2uq.quantizers.base import mean_over_processes
from lightning_n2uq.quantizers.ranges import best_range, sample_values


class RangeInitialization(Callback):
    """Fits the input ranges of N2UQ's activation quantizers to the first training batch.

    The published start covers inputs from 0 to 2, whatever the data; where inputs reach further, thresholds
    have to learn their way out, at a tenth of the learning rate. Here the first forward pass of a run sets
    `scale_in = 2 / r` and `scale_out = r / 2` of every quantizer, `r` the upper end of the range from 0 whose
    evenly spaced levels have the least squared error over the layer's inputs; ranks average `r`. From then on
    thresholds and scales learn as without the callback.

    Only quantizers that still have their first values are fitted: thresholds that were loaded with
    `init_from` or from a checkpoint stay as they are.

    Args:
        layers: Shell patterns of layer names, for example `layer1.*`.

    Raises:
        ValueError: No layer that matches the given patterns has learned thresholds (or the ablation's fixed
            ones). Without patterns it is a warning.
    """

    def __init__(self, layers: tuple[str, ...] = ("*",)) -> None:
        self.patterns = tuple(layers)
        self.ranges: dict[str, float] = {}
        self._waiting: dict[str, LearnableThresholdQuantizer] = {}
        self._hooks: list[RemovableHandle] = []
        self._done = False

    @property
    def state_key(self) -> str:
        """Returns a key that tells callbacks on different layers apart."""
        return f"RangeInitialization{self.patterns!r}"

    def state_dict(self) -> dict[str, Any]:
        """Returns whether the ranges are fitted, and the upper ends by layer."""
        return {"done": self._done, "ranges": dict(self.ranges)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Fits nothing again in a run that goes on."""
        self._done, self.ranges = state_dict["done"], dict(state_dict["ranges"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins anew with every fit; a checkpoint that the run goes on from is read afterwards."""
        self._done, self.ranges = False, {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the quantizers and waits for their first input."""
        if self._done:
            return
        found = {
            layer.name: layer.activation_quantizer
            for layer in matching_layers(pl_module, self.patterns, "layers")
            if isinstance(layer.activation_quantizer, LearnableThresholdQuantizer)
        }
        if not found and self.patterns != ("*",):
            raise ValueError(
                "layers: none of the chosen layers has an activation quantizer 'n2uq' or 'n2uq_fixed'"
            )
        if not found:  # a config that has it, with another method
            rank_zero_warn(
                "RangeInitialization: no layer has an activation quantizer 'n2uq' or 'n2uq_fixed', so there "
                "is nothing to fit; other methods fit their ranges by themselves"
            )
        self._waiting = {name: one for name, one in found.items() if is_new(one)}
        if kept := len(found) - len(self._waiting):
            rank_zero_warn(
                f"RangeInitialization: {kept} of {len(found)} layers keep thresholds that were loaded"
            )
        self._hooks = [
            quantizer.register_forward_pre_hook(self._hook(name)) for name, quantizer in self._waiting.items()
        ]

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Ends after the first batch."""
        if self._hooks:
            self._release()
        if not self._done and self._waiting:
            names = ", ".join(self._waiting)
            rank_zero_warn(
                f"RangeInitialization: no finite input above 0 in the first batch, not fitted: {names}"
            )
        self._done, self._waiting = True, {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves no hook behind."""
        self._release()

    def _hook(self, name: str) -> Any:  # noqa: ANN401
        def fit(quantizer: nn.Module, args: tuple[Any, ...]) -> None:
            if name in self._waiting and quantizer.training and not args[0].is_meta:
                self._fit(name, args[0])

        return fit

    @torch.no_grad()
    def _fit(self, name: str, x: Tensor) -> None:
        """Fits one quantizer to the mean over ranks of the ends that fit their inputs. A collective call."""
        sample = sample_values(x).clamp_min(0)
        useful = bool(sample.numel()) and bool(sample.isfinite().all()) and bool(sample.any())
        end = (
            best_range(sample, self._waiting[name].num_levels)[1]
            if useful
            else x.new_zeros((), dtype=torch.float32)
        )
        shared = mean_over_processes(torch.stack([torch.full_like(end, float(useful)), end]))
        if not bool(shared[0]):
            return
        end = shared[1] / shared[0]
        set_method_range(self._waiting.pop(name), torch.zeros_like(end), end)
        self.ranges[name] = float(end)

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


@torch.no_grad()
def is_new(quantizer: LearnableThresholdQuantizer) -> bool:
    """Returns whether a quantizer has the parameters that it was made with."""
    step = output_step(quantizer.num_levels - 1)
    first = (
        (quantizer.start, 0.0),
        (quantizer.widths, step),
        (quantizer.scale_in, 1.0),
        (quantizer.scale_out, 1.0),
    )
    return all(bool((parameter == torch.full_like(parameter, value)).all()) for parameter, value in first)
