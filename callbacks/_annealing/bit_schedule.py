"""Bit widths that change during training, and what has to follow such a change."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_n2uq.callbacks._common.quantized_layers import QuantizedLayer
from lightning_n2uq.callbacks._common.timeline import check_point
from lightning_n2uq.quantizers import Quantizer
from lightning_n2uq.quantizers.base import check_bits
from lightning_n2uq.quantizers.bit_width import change_bits
from lightning_n2uq.utils.validation import check, check_choice

_OF = ("both", "activations", "weights")


@dataclass(frozen=True)
class BitSchedule:
    """Widths one after the other and where each begins; no widths, no schedule.

    Attributes:
        widths: Bit widths in order.
        at: Where each begins, in the callback's unit.
        of: Whose width changes: `both`, `activations` or `weights`.
    """

    widths: tuple[int, ...]
    at: tuple[float, ...]
    of: str

    @classmethod
    def build(
        cls,
        bits: Sequence[int] | None,
        bits_at: Sequence[float] | None,
        of: str,
        unit: str,
        freeze_after: float | None,
    ) -> BitSchedule:
        """Returns a schedule of `ThresholdAnnealing`'s arguments; `ValueError` names a wrong one."""
        check_choice("bits_of", of, _OF)
        if (bits is None) != (bits_at is None) or (bits is not None and not bits):
            raise ValueError(f"bits: got {bits!r} with bits_at {bits_at!r}, allowed is both or none")
        if bits is None or bits_at is None:
            return cls((), (), of)
        points = tuple(check_point("bits_at", point, unit) for point in bits_at)
        fits = len(points) == len(bits) and points[0] == 0 and sorted(set(points)) == list(points)
        check(fits, "bits_at", list(bits_at), f"are {len(bits)} increasing points, the first 0")
        fits = freeze_after is None or points[-1] < freeze_after
        check(fits, "bits_at", points[-1], f"is before freeze_after ({freeze_after})")
        return cls(tuple(check_bits(width) for width in bits), points, of)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for a checkpoint."""
        return {"widths": list(self.widths), "at": list(self.at), "of": self.of}

    def width_at(self, step: int, steps_per_unit: float) -> int:
        """Returns the bit width at an optimizer step."""
        begun = [width for width, at in zip(self.widths, self.at, strict=True) if step >= at * steps_per_unit]
        return begun[-1]

    def quantizers(self, layer: QuantizedLayer) -> list[Quantizer]:
        """Returns the quantizers of a layer whose width changes."""
        both = {"weights": layer.weight_quantizer, "activations": layer.activation_quantizer}
        return [q for name, q in both.items() if q is not None and self.of in ("both", name)]

    def check_last(self, layers: list[QuantizedLayer]) -> None:
        """Raises `ValueError` unless the last width is the one the network is built with and deployed in."""
        for layer in layers:
            for quantizer in self.quantizers(layer):
                if quantizer.bits != self.widths[-1]:
                    raise ValueError(
                        f"bits: the last is {self.widths[-1]}, "
                        f"allowed is the network's own, which is {quantizer.bits} in {layer.name}"
                    )

    def apply(self, layers: list[QuantizedLayer], width: int) -> dict[nn.Parameter, nn.Parameter] | None:
        """Gives the layers a width; returns replaced parameters, or None if nothing changed."""
        quantizers = [q for layer in layers for q in self.quantizers(layer) if q.bits != width]
        replaced: dict[nn.Parameter, nn.Parameter] = {}
        for quantizer in quantizers:
            replaced.update(change_bits(quantizer, width))
        return replaced if quantizers else None

    def target(self, layer: QuantizedLayer, steps: int) -> list[tuple[Quantizer, int]]:
        """Returns a layer's quantizers and their width where its activation quantizer has this many steps."""
        return [(quantizer, (steps + 1).bit_length() - 1) for quantizer in self.quantizers(layer)]


Target = Callable[[QuantizedLayer, int], list[tuple[Quantizer, int]]]


def follow_checkpoints(model: nn.Module, layers: list[QuantizedLayer], target: Target) -> RemovableHandle:
    """Gives every layer the width that it was saved with, before each state dict is loaded."""
    paths = {module: name for name, module in model.named_modules()}

    def adapt(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
        for layer in layers:
            place = f"{prefix}{paths[layer.module]}.activation_quantizer"
            saved = state_dict.get(f"{place}.widths", state_dict.get(f"{place}.inner.widths"))
            if saved is not None:
                for quantizer, bits in target(layer, saved.numel()):
                    change_bits(quantizer, bits)

    handle: RemovableHandle = model.register_load_state_dict_pre_hook(adapt)  # type: ignore[no-untyped-call]
    return handle


def tell_trainer(
    trainer: Trainer, pl_module: LightningModule, replaced: dict[nn.Parameter, nn.Parameter]
) -> None:
    """Passes a change of width on to optimizers, to DDP and to `ModelCheckpoint`.

    Raises:
        ValueError: The strategy keeps parameters in a form in which they cannot be replaced.
    """
    if replaced:
        _exchange_in_optimizers(trainer, replaced)
        _wrap_again(trainer, pl_module)
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            _forget_best(trainer, callback)


def _exchange_in_optimizers(trainer: Trainer, replaced: dict[nn.Parameter, nn.Parameter]) -> None:
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]
        for old in replaced:
            optimizer.state.pop(old, None)  # moments of thresholds that are gone


def _wrap_again(trainer: Trainer, pl_module: LightningModule) -> None:
    """Wraps the module in DDP again, whose buckets hold the old parameters."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.model = pl_module
        gc.collect()  # the old wrapper's hooks go with it
        strategy.configure_ddp()
    elif not isinstance(strategy, SingleDeviceStrategy):
        raise ValueError(f"bits: cannot change during training with {type(strategy).__name__}, use 'ddp'")


def _forget_best(trainer: Trainer, callback: ModelCheckpoint) -> None:
    """Forgets the best checkpoints: one of another width is of another network."""
    for path in list(callback.best_k_models):
        trainer.strategy.remove_checkpoint(path)
    callback.best_k_models.clear()
    callback.kth_best_model_path = callback.best_model_path = ""
    callback.best_model_score = callback.current_score = None
