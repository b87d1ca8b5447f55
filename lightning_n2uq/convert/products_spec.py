"""What quantizes attention's two products."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_n2uq.quantizers import activation_quantizer

_UNSIGNED = {"lsq_signed": "lsq"}
"""Methods for probabilities, which are never negative, where the method of the other operands is signed."""


@dataclass(frozen=True)
class ProductsSpec:
    """What quantizes attention's two products: bits and method of all four operands.

    Attributes:
        bits: 2 to 8.
        quantizer: A key of `quantizers.ACTIVATION_QUANTIZERS`.
    """

    bits: int = 4
    quantizer: str = "n2uq"

    def build(self, probabilities: bool = False) -> nn.Module:
        """Returns a new quantizer of an operand; `ValueError` names what is not allowed."""
        name = _UNSIGNED.get(self.quantizer, self.quantizer) if probabilities else self.quantizer
        return activation_quantizer(name, self.bits)

    def __str__(self) -> str:
        return f"{self.quantizer} {self.bits}"
