"""Callbacks that need whole weights, of which a rank of sharded training has a part."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Callback

_OF_QUANTIZERS = ("QuantizationMonitor", "ThresholdAnnealing", "EntropyRegularizer", "ProximalAnnealing")
_AVERAGES = ("StochasticWeightAveraging", "WeightAveraging")  # the second from Lightning 2.6 on


def refuse_whole_weights(callbacks: Iterable[Callback]) -> None:
    """Refuses callbacks that read, change or average whole weights; subclasses, too.

    Args:
        callbacks: Those of a trainer.

    Raises:
        ValueError: There is one among them.
    """
    for callback in callbacks:
        kinds = (kind for kind in type(callback).__mro__ if kind.__module__.startswith("lightning"))
        if any(kind.__name__ in (*_OF_QUANTIZERS, *_AVERAGES) for kind in kinds):
            raise ValueError(
                f"callbacks: got {type(callback).__name__}, allowed with nuqsgd_fsdp are callbacks that need "
                "no whole weights: every rank has a shard of them"
            )
