"""Which layers of a network are quantized, and how: defaults, and rules by name, type and position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from lightning_n2uq.layers import QuantSpec
from lightning_n2uq.utils.validation import check, check_choice

TYPES = ("any", "conv", "pointwise", "depthwise", "linear", "attention")
"""`conv` covers `pointwise` (1x1) and `depthwise` (one input channel per group, more than one group)."""

POSITIONS = ("any", "first", "last", "inner")
_SPEC_FIELDS = tuple(field.name for field in fields(QuantSpec))


@dataclass(frozen=True)
class Layer:
    """A layer that could be quantized, as rules see it.

    Attributes:
        name: The dotted module name.
        types: What it is, in words of `TYPES`, the most general last.
        index: Its place among such layers, in the order in which the network registers its modules.
        count: The number of such layers.
    """

    name: str
    types: tuple[str, ...]
    index: int
    count: int

    @property
    def is_first(self) -> bool:
        """Returns whether it is the first such layer."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Returns whether it is the last such layer."""
        return self.index == self.count - 1


@dataclass(frozen=True)
class Rule:
    """Applies to the layers that fit `name`, `type` and `position`; what is None comes from the policy.

    Attributes:
        name: A shell pattern of the dotted module name, such as `features.*.conv`.
        type: One of `TYPES`.
        position: `any`, `first`, `last`, `inner` (neither), or `start:stop` over the layers' order.
        quantize: False leaves the layer in full precision.
        weight_bits: The bits of weights, 2 to 8.
        activation_bits: The bits of activations, 2 to 8.
        weight_quantizer: The method for weights, a key of `quantizers.WEIGHT_QUANTIZERS`.
        activation_quantizer: The method for activations, a key of `quantizers.ACTIVATION_QUANTIZERS`.
    """

    name: str = "*"
    type: str = "any"
    position: str = "any"
    quantize: bool = True
    weight_bits: int | None = None
    activation_bits: int | None = None
    weight_quantizer: str | None = None
    activation_quantizer: str | None = None

    def __post_init__(self) -> None:
        check_choice("type", self.type, TYPES)
        if self.position not in POSITIONS:
            _slice(self.position)

    def matches(self, layer: Layer) -> bool:
        """Returns whether the rule is about `layer`."""
        if not fnmatchcase(layer.name, self.name) or (self.type != "any" and self.type not in layer.types):
            return False
        if self.position in POSITIONS:
            first, last = layer.is_first, layer.is_last
            places = {"any": True, "first": first, "last": last, "inner": not (first or last)}
            return places[self.position]
        return layer.index in range(layer.count)[_slice(self.position)]


@dataclass(frozen=True)
class Policy:
    """Defaults and rules; the first rule that matches a layer decides about it.

    The first and the last layer stay in full precision, as in the papers, unless the matching rule names
    their position (`position: first`) or `skip_first` or `skip_last` is off.

    Attributes:
        weight_bits: The bits of weights, 2 to 8; 32 with `float`.
        activation_bits: The bits of activations, 2 to 8; 32 with `float`.
        weight_quantizer: The method for weights, a key of `quantizers.WEIGHT_QUANTIZERS`.
        activation_quantizer: The method for activations, a key of `quantizers.ACTIVATION_QUANTIZERS`.
        skip_first: Whether the first layer stays in full precision.
        skip_last: Whether the last layer stays in full precision.
        rules: The rules in order of precedence.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    weight_quantizer: str = "n2uq"
    activation_quantizer: str = "n2uq"
    skip_first: bool = True
    skip_last: bool = True
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for spec in (self.spec(), *(self.spec(rule) for rule in self.rules)):
            spec.build()  # refuses unknown methods and bits now, not in the middle of a conversion

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Policy:
        """Returns a policy from plain values, such as a YAML file's; `rules` is a list of mappings.

        Raises:
            ValueError: A key is unknown or a value is not allowed.
        """
        values = dict(values)
        rules = tuple(_build(Rule, "rules", rule) for rule in values.pop("rules", None) or ())
        policy: Policy = _build(cls, "policy", {**values, "rules": rules})
        return policy

    def spec(self, rule: Rule | None = None) -> QuantSpec:
        """Returns the methods and bits under `rule`."""
        spec = QuantSpec(*(getattr(self, name) for name in _SPEC_FIELDS))
        own = {} if rule is None else {name: getattr(rule, name) for name in _SPEC_FIELDS}
        return replace(spec, **{name: value for name, value in own.items() if value is not None})

    def decide(self, layer: Layer) -> tuple[QuantSpec | None, str]:
        """Returns the methods and bits for `layer`, or None, and the reason in words."""
        number, rule = next(
            ((i, rule) for i, rule in enumerate(self.rules) if rule.matches(layer)), (None, None)
        )
        for position, skip in (("first", self.skip_first), ("last", self.skip_last)):
            here = layer.is_first if position == "first" else layer.is_last
            if here and skip and (rule is None or rule.position != position):
                return None, f"{position} layer"
        reason = "default" if rule is None else f"rule {number}"
        if rule is not None and not rule.quantize:
            return None, reason
        spec = self.spec(rule)
        if spec.weight_quantizer == spec.activation_quantizer == "float":
            return None, f"{reason}: float"
        return spec, reason


def _slice(text: str) -> slice:
    parts = text.split(":")
    try:
        start, stop = (int(part) if part else None for part in parts)
    except ValueError:
        raise ValueError(
            f"position: got {text!r}, allowed are {', '.join(POSITIONS)} or 'start:stop'"
        ) from None
    return slice(start, stop)


def _build(kind: type, argument: str, values: Any) -> Any:  # noqa: ANN401 -- a small generic constructor
    if isinstance(values, kind):
        return values
    allowed = [field.name for field in fields(kind)]
    check(isinstance(values, Mapping), argument, values, f"is a mapping with {', '.join(allowed)}")
    if unknown := sorted(set(values) - set(allowed)):
        raise ValueError(f"{argument}: got {', '.join(unknown)}, allowed are {', '.join(allowed)}")
    return kind(**values)
