"""Callbacks that a conversion has to come before."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch import callbacks as lightning_callbacks

_COPIES = ("StochasticWeightAveraging", "WeightAveraging")  # the second from Lightning 2.6 on
_LOOKS = ("QuantizationMonitor", "ThresholdAnnealing", "EntropyRegularizer", "TorchCompile")


def needs_quantized(callback: Callback) -> bool:
    """Returns whether a callback copies the module, or looks for its quantized layers, as it is set up."""
    kinds = tuple(kind for name in _COPIES if (kind := getattr(lightning_callbacks, name, None)))
    names = {
        kind.__name__ for kind in type(callback).__mro__ if kind.__module__.startswith("lightning_n2uq.")
    }
    return isinstance(callback, kinds) or not names.isdisjoint(_LOOKS)


def check_place(quantizer: Callback, trainer: Trainer) -> None:
    """Raises `ValueError` where such a callback is set up before the one that quantizes."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks[: callbacks.index(quantizer)]:
        if needs_quantized(callback):
            raise ValueError(
                f"callbacks: got QuantizeModel behind {type(callback).__name__}, allowed is before it, so "
                "that it finds the quantized layers"
            )


def quantizing_first(callbacks: list[Callback], kind: type[Callback]) -> list[Callback]:
    """Returns the callbacks with those of `kind` at the front, otherwise in their order."""
    return sorted(callbacks, key=lambda callback: not isinstance(callback, kind))
