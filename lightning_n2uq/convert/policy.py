"""Which layers of a network are quantized, and how: defaults, and rules by name, type and position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from lightning_n2uq.convert.products_spec import ProductsSpec
from lightning_n2uq.layers import QuantSpec
from lightning_n2uq.utils.validation import check, check_choice

TYPES = (
    "any",
    "conv",
    "pointwise",
    "depthwise",
    "linear",
    "attention",
    "products",
    "transposed",
    "recurrent",
)
"""`conv` covers `pointwise` (1x1) and `depthwise` (one input channel per group, more than one group).
`attention` is torch's attention layer with its projections; `products` are the two products of activations in
any attention, named `<module>.products`. Transposed convolutions are `transposed`; `recurrent` are LSTM, GRU
and RNN, layers and cells."""

POSITIONS = ("any", "first", "last", "inner")
_SPEC_FIELDS = tuple(field.name for field in fields(QuantSpec))


@dataclass(frozen=True)
class Layer:
    """A layer that could be quantized, as rules see it.

    Attributes:
        name: The dotted module name.
        types: What it is, in words of `TYPES`, the most general last.
        index: Its place among such layers of its part, in the order in which they run on an example input, or
            else in which the network registers them.
        count: The number of such layers.
        first: Whether it takes the network's input; None says that the index decides.
        last: Whether its output goes to no other such layer; None says that the index decides.
        source: What the order comes from, in words.
    """

    name: str
    types: tuple[str, ...]
    index: int
    count: int
    first: bool | None = None
    last: bool | None = None
    source: str = ""

    @property
    def is_first(self) -> bool:
        """Returns whether it is a first layer."""
        return self.index == 0 if self.first is None else self.first

    @property
    def is_last(self) -> bool:
        """Returns whether it is a last layer, one of all heads."""
        return self.index == self.count - 1 if self.last is None else self.last


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
        attention_bits: The bits of the operands of attention's products, 2 to 8; 32 with `float`.
        attention_quantizer: The method for them, a key of `quantizers.ACTIVATION_QUANTIZERS`.
    """

    name: str = "*"
    type: str = "any"
    position: str = "any"
    quantize: bool = True
    weight_bits: int | None = None
    activation_bits: int | None = None
    weight_quantizer: str | None = None
    activation_quantizer: str | None = None
    attention_bits: int | None = None
    attention_quantizer: str | None = None

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
        skip_last: Whether the last layer stays in full precision; of a detector, the last of every head.
        rules: The rules in order of precedence.
        modules: The parts that are quantized, by name, each with a first and a last layer of its own; without
            any, the whole model is one part.
        exclude: Shell patterns of names that stay in full precision, whatever the rules say; the name of a
            module stands for all that is in it.
        attention_bits: The bits of all operands of attention's two products (queries, keys, probabilities,
            values), 2 to 8; None leaves the products in full precision.
        attention_quantizer: The method for them, a key of `quantizers.ACTIVATION_QUANTIZERS`; None takes the
            method for activations.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    weight_quantizer: str = "n2uq"
    activation_quantizer: str = "n2uq"
    skip_first: bool = True
    skip_last: bool = True
    rules: tuple[Rule, ...] = ()
    modules: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    attention_bits: int | None = None
    attention_quantizer: str | None = None

    def __post_init__(self) -> None:
        for name in ("modules", "exclude"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        for rule in (None, *self.rules):
            self.products_spec(rule)
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

    def to_mapping(self) -> dict[str, Any]:
        """Returns plain values for YAML or a checkpoint; `from_mapping` makes an equal policy of them."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    def spec(self, rule: Rule | None = None) -> QuantSpec:
        """Returns the methods and bits under `rule`."""
        spec = QuantSpec(*(getattr(self, name) for name in _SPEC_FIELDS))
        own = {} if rule is None else {name: getattr(rule, name) for name in _SPEC_FIELDS}
        return replace(spec, **{name: value for name, value in own.items() if value is not None})

    @property
    def asks_for_products(self) -> bool:
        """Whether attention's products are to be quantized somewhere."""
        return any(self.products_spec(rule) is not None for rule in (None, *self.rules))

    def products_spec(self, rule: Rule | None = None) -> ProductsSpec | None:
        """Returns bits and method of attention's products under `rule`, None for full precision."""
        bits, method = self.attention_bits, self.attention_quantizer
        if rule is not None:
            bits = bits if rule.attention_bits is None else rule.attention_bits
            method = method if rule.attention_quantizer is None else rule.attention_quantizer
        if bits is None:
            check(method in (None, "float"), "attention_quantizer", method, "is none without attention_bits")
            return None
        spec = ProductsSpec(bits, self.spec(rule).activation_quantizer if method is None else method)
        spec.build()  # refuses unknown methods and bits
        return None if spec.quantizer == "float" else spec

    def decide_products(self, layer: Layer) -> tuple[ProductsSpec | None, str]:
        """Returns bits and method for attention's products, or None, and the reason in words."""
        if pattern := next((p for p in self.exclude if _covers(p, layer.name)), None):
            return None, f"exclude {pattern!r}"
        number, rule = self._rule(layer)
        reason = "default" if rule is None else f"rule {number}"
        if rule is not None and not rule.quantize:
            return None, reason
        spec = self.products_spec(rule)
        return spec, reason if spec is not None else f"{reason}: float"

    def _rule(self, layer: Layer) -> tuple[int | None, Rule | None]:
        return next(((i, rule) for i, rule in enumerate(self.rules) if rule.matches(layer)), (None, None))

    def decide(self, layer: Layer) -> tuple[QuantSpec | None, str]:
        """Returns the methods and bits for `layer`, or None, and the reason in words."""
        if pattern := next((p for p in self.exclude if _covers(p, layer.name)), None):
            return None, f"exclude {pattern!r}"
        number, rule = self._rule(layer)
        for position, skip in (("first", self.skip_first), ("last", self.skip_last)):
            here = layer.is_first if position == "first" else layer.is_last
            if here and skip and (rule is None or rule.position != position):
                return None, f"{position} layer{f' {layer.source}' if layer.source else ''}"
        reason = "default" if rule is None else f"rule {number}"
        if rule is not None and not rule.quantize:
            return None, reason
        spec = self.spec(rule)
        if spec.weight_quantizer == spec.activation_quantizer == "float":
            return None, f"{reason}: float"
        return spec, reason


def _covers(pattern: str, name: str) -> bool:
    """Returns whether a pattern fits a name or a beginning of it that ends at a dot."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def _names(argument: str, value: Any) -> tuple[str, ...]:  # noqa: ANN401 -- parsed YAML
    fits = isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
    check(fits, argument, value, "is a list of names")
    return tuple(value)


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
