"""What the quantization of every layer does to a network's outputs and loss, layer by layer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_n2uq.convert.policy import Policy
from lightning_n2uq.convert.widths import Width, width
from lightning_n2uq.layers import QuantSpec
from lightning_n2uq.utils.validation import check

MEASURES = ("kl", "loss")
_FILE_FORMAT = 1


@dataclass(frozen=True)
class LayerScores:
    """One layer.

    Attributes:
        name: The dotted module name.
        weights: The number of its weights.
        macs: Its multiply-accumulates for one input.
        spec: The methods that the policy gives it.
        position: `first`, `last` or `any`: what a rule about it has to say.
        kl: The divergence of the network's outputs from the reference, in nats, by width; empty where the
            outputs are no scores of classes.
        loss: The change of the loss by width; empty where there is no loss.
    """

    name: str
    weights: int
    macs: int
    spec: QuantSpec
    position: str = "any"
    kl: dict[Width, float] = field(default_factory=dict)
    loss: dict[Width, float] = field(default_factory=dict)

    def bit_operations(self, bits: Width) -> int:
        """Returns multiply-accumulates times both widths; 32 for a side in full precision."""
        return (
            self.macs
            * self._weight_bits(bits)
            * (32 if self.spec.activation_quantizer == "float" else bits.inputs)
        )

    def weight_bytes(self, bits: Width) -> int:
        """Returns the bytes of the packed codes."""
        return math.ceil(self.weights * self._weight_bits(bits) / 8)

    def bits_of_weights(self, bits: Width) -> int:
        """Returns the bits of all weights together, packed without gaps."""
        return self.weights * self._weight_bits(bits)

    def _weight_bits(self, bits: Width) -> int:
        return 32 if self.spec.weight_quantizer == "float" else bits.weights


@dataclass
class Sensitivity:
    """The scores of all layers.

    Attributes:
        layers: The layers that a policy quantizes, in order.
        widths: The widths that were tried, the cheapest first.
        policy: The policy that chose layers and methods.
        batches: The number of batches behind the scores.
        reference_loss: The loss before anything was changed; None without a loss.
        left_out: Reasons of the layers without scores, by name.
    """

    layers: list[LayerScores]
    widths: tuple[Width, ...]
    policy: Policy
    batches: int
    reference_loss: float | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def measures(self) -> tuple[str, ...]:
        """Returns which of `kl` and `loss` there are."""
        return tuple(name for name in MEASURES if any(getattr(layer, name) for layer in self.layers))

    def to_mapping(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "format": _FILE_FORMAT,
            "batches": self.batches,
            "reference_loss": self.reference_loss,
            "widths": [str(bits) for bits in self.widths],
            "layers": [_plain(layer) for layer in self.layers],
            "left_out": self.left_out,
            "policy": self.policy.to_mapping(),
        }

    @classmethod
    def from_mapping(cls, values: Any, argument: str = "scores") -> Sensitivity:  # noqa: ANN401 -- a file's
        """Returns what `to_mapping` made plain; `ValueError` names `argument` where it is something else."""
        fits = isinstance(values, Mapping) and values.get("format") == _FILE_FORMAT
        check(fits, argument, type(values).__name__, "is a file that n2uq sensitivity has written")
        try:
            return cls(
                [_layer(layer) for layer in values["layers"]],
                tuple(width(text) for text in values["widths"]),
                Policy.from_mapping(values["policy"]),
                values["batches"],
                values["reference_loss"],
                dict(values["left_out"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{argument}: got a damaged file ({type(error).__name__}: {error})") from error

    def to_json(self) -> str:
        """Returns the text of a file."""
        return json.dumps(self.to_mapping(), indent=1)

    def __str__(self) -> str:
        head = ["layer", "weights", "MACs"]
        head += [f"{name} {bits}" for name in self.measures for bits in self.widths]
        rows = [head, *(self._row(layer) for layer in self.layers)]
        sizes = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join([row[0].ljust(sizes[0]), *map(str.rjust, row[1:], sizes[1:])]) for row in rows]
        loss = "" if self.reference_loss is None else f"; loss {self.reference_loss:.4g} before"
        lines.append(f"{len(self.layers)} layers, {self.batches} batches{loss}")
        lines += [f"without scores: {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines)

    def _row(self, layer: LayerScores) -> list[str]:
        scores = [getattr(layer, name)[bits] for name in self.measures for bits in self.widths]
        return [layer.name, f"{layer.weights:,}", f"{layer.macs:,}", *(f"{x:.2g}" for x in scores)]


def _plain(layer: LayerScores) -> dict[str, Any]:
    scores = {name: {str(k): v for k, v in getattr(layer, name).items()} for name in MEASURES}
    return {**vars(layer), "spec": vars(layer.spec), **scores}


def _layer(values: dict[str, Any]) -> LayerScores:
    scores = {name: {width(k): float(v) for k, v in values[name].items()} for name in MEASURES}
    return LayerScores(**{**values, "spec": QuantSpec(**values["spec"]), **scores})
