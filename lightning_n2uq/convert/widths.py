"""Bit widths that a layer may get: one number for weights and inputs alike, or one for each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from lightning_n2uq.layers import QuantSpec
from lightning_n2uq.utils.validation import check

FORMS = "are 2 to 8, such as 4, or weights/inputs, such as 2/4"


class Width(NamedTuple):
    """Bits of a layer's weights and of its inputs."""

    weights: int
    inputs: int

    def __str__(self) -> str:
        return str(self.weights) if self.weights == self.inputs else f"{self.weights}/{self.inputs}"


def width(value: object, argument: str = "bits") -> Width:
    """Returns a width from `4`, `"4"`, `"2/4"` or a pair.

    Raises:
        ValueError: It is none of these, or out of range.
    """
    parts: Iterable[object] = value.split("/") if isinstance(value, str) else (value,)
    if isinstance(value, tuple):
        parts = value
    texts = [str(part).strip() for part in parts if not isinstance(part, bool)]
    numbers = [int(text) for text in texts if text.isdecimal()]
    fits = len(numbers) == len(texts) in (1, 2) and all(2 <= n <= 8 for n in numbers)
    check(fits, argument, value, FORMS)
    return Width(numbers[0], numbers[-1])


def widths(values: Iterable[object], argument: str = "bits") -> tuple[Width, ...]:
    """Returns several widths, each once, the cheapest product first; at least one."""
    found = sorted({width(value, argument) for value in values}, key=lambda w: (w.weights * w.inputs, w))
    check(bool(found), argument, list(values), FORMS)
    return tuple(found)


def at_width(spec: QuantSpec, bits: Width) -> QuantSpec:
    """Returns the methods with other bits; a side in full precision stays so."""
    return replace(
        spec,
        weight_bits=32 if spec.weight_quantizer == "float" else bits.weights,
        activation_bits=32 if spec.activation_quantizer == "float" else bits.inputs,
    )
