"""Averages of weights beside a schedule of bit widths."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Callback
from lightning.pytorch import callbacks as lightning_callbacks


def refuse_averaging(callbacks: Iterable[Callback]) -> None:
    """Refuses callbacks that average weights: thresholds change their number with the bit width.

    Raises:
        ValueError: A callback averages weights.
    """
    names = ("StochasticWeightAveraging", "WeightAveraging")  # the second from Lightning 2.6 on
    kinds = tuple(kind for name in names if (kind := getattr(lightning_callbacks, name, None)))
    for callback in callbacks:
        if isinstance(callback, kinds):
            raise ValueError(
                f"bits: got a schedule of widths beside {type(callback).__name__}, allowed is one of the "
                "two: an average needs as many thresholds at every step"
            )
