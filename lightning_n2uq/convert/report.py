"""What a conversion did to every layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from lightning_n2uq.convert.products_spec import ProductsSpec
from lightning_n2uq.layers import QuantSpec

QUANTIZED, EXCLUDED, UNSUPPORTED = "quantized", "excluded", "unsupported"


@dataclass
class LayerReport:
    """One layer.

    Attributes:
        name: The dotted module name.
        type: The class of the float layer.
        status: `quantized`, `excluded` (by the policy) or `unsupported`.
        reason: Which rule decided, or what stands in the way.
        weight: The method and bits of the weights, such as `n2uq 4`, or an empty string.
        activation: The method and bits of the inputs, likewise.
        parameters: The number of values in the layer's own parameters.
        input_range: The ends of the calibrated input range, or None.
        spec: The methods and bits, where the layer is quantized.
        products: Those of attention's products, where these are quantized.
    """

    name: str
    type: str
    status: str
    reason: str
    weight: str = ""
    activation: str = ""
    parameters: int = 0
    input_range: tuple[float, float] | None = None
    spec: QuantSpec | None = None
    products: ProductsSpec | None = None


@dataclass
class ConversionReport:
    """Every layer with weights, in the order in which the network registers them, and attention's products.

    Attributes:
        model: The converted network (the one passed in, changed in place).
        layers: An entry per layer; modules without matrix-like parameters (norms) are left out.
    """

    model: nn.Module = field(repr=False)
    layers: list[LayerReport]

    def of(self, status: str) -> list[LayerReport]:
        """Returns the layers with that status."""
        return [layer for layer in self.layers if layer.status == status]

    @property
    def quantized(self) -> list[str]:
        """Returns the names of the layers that are quantized now."""
        return [layer.name for layer in self.of(QUANTIZED)]

    @property
    def excluded(self) -> list[str]:
        """Returns the names of the layers that the policy leaves in full precision."""
        return [layer.name for layer in self.of(EXCLUDED)]

    @property
    def unsupported(self) -> list[str]:
        """Returns the names of the layers that cannot be converted and stay in full precision."""
        return [layer.name for layer in self.of(UNSUPPORTED)]

    def __str__(self) -> str:
        total = sum(layer.parameters for layer in self.layers)
        share = sum(layer.parameters for layer in self.of(QUANTIZED)) / max(total, 1)
        counts = ", ".join(f"{len(self.of(s))} {s}" for s in (QUANTIZED, EXCLUDED, UNSUPPORTED))
        rows = [("layer", "type", "status", "weights", "inputs", "range", "reason")]
        for layer in self.layers:
            ends = "" if layer.input_range is None else "{:.3g} .. {:.3g}".format(*layer.input_range)
            rows.append(
                (layer.name, layer.type, layer.status, layer.weight, layer.activation, ends, layer.reason)
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([*lines, f"{counts}; {100 * share:.1f} % of these layers' parameters quantized"])
