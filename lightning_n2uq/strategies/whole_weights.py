"""Callbacks that a strategy cannot serve: those of whole weights, or of every step's weights."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Callback

_OF_QUANTIZERS = (
    "QuantizationMonitor", "ThresholdAnnealing", "EntropyRegularizer", "ProximalAnnealing",
    "OscillationControl", "BatchNormReestimation", "RangeInitialization",
)  # fmt: skip
_AVERAGES = ("StochasticWeightAveraging", "WeightAveraging")  # the second from Lightning 2.6 on


def refuse_whole_weights(callbacks: Iterable[Callback]) -> None:
    """Refuses callbacks that read, change or average whole weights; subclasses, too.

    Args:
        callbacks: Those of a trainer.

    Raises:
        ValueError: There is one among them.
    """
    allowed = "with nuqsgd_fsdp are callbacks that need no whole weights: every rank has a shard of them"
    _refuse(callbacks, (*_OF_QUANTIZERS, *_AVERAGES), allowed)


def refuse_own_freezing(callbacks: Iterable[Callback]) -> None:
    """Refuses callbacks that hold single weights by what they did in the last steps; subclasses, too.

    Args:
        callbacks: Those of a trainer.

    Raises:
        ValueError: There is one among them.
    """
    allowed = "with nuqsgd_local are callbacks that freeze no weights: ranks would freeze different ones"
    _refuse(callbacks, ("OscillationControl",), allowed)


def _refuse(callbacks: Iterable[Callback], names: tuple[str, ...], allowed: str) -> None:
    for callback in callbacks:
        kinds = (kind for kind in type(callback).__mro__ if kind.__module__.startswith("lightning"))
        if any(kind.__name__ in names for kind in kinds):
            raise ValueError(f"callbacks: got {type(callback).__name__}, allowed {allowed}")
