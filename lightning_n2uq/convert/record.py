"""Which layers of a module are quantized and how, kept on the module and in its checkpoints.

The record holds the outcome, a layer's methods and bits by name, beside the policy that led to it: a fresh
module is converted by it into the same structure, whatever order its layers run in today.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from lightning_n2uq.convert.attention_hosts import products_obstacle, quantize_products, takes_products
from lightning_n2uq.convert.policy import Policy
from lightning_n2uq.convert.products_spec import ProductsSpec
from lightning_n2uq.convert.quantize import quantize_model, swap
from lightning_n2uq.convert.replace import obstacle, quantized
from lightning_n2uq.convert.report import QUANTIZED, ConversionReport
from lightning_n2uq.layers import QuantSpec
from lightning_n2uq.utils.validation import check

KEY = "n2uq_quantization"
"""The checkpoint's entry."""

_ATTRIBUTE = "_n2uq_quantization"


@dataclass(frozen=True)
class Record:
    """What was quantized.

    Attributes:
        policy: The policy as plain values.
        layers: The fields of `QuantSpec` by the layer's name.
        products: The fields of `ProductsSpec` by the name of attention's products.
    """

    policy: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    products: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_mapping(self) -> dict[str, Any]:
        """Returns plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, values: Any, argument: str) -> Record:  # noqa: ANN401 -- read from a file
        """Returns the record in a checkpoint's entry; `ValueError` names `argument` where it is none."""
        fits = isinstance(values, Mapping) and {"policy", "layers"} <= set(values)
        check(fits, argument, type(values).__name__, f"is a checkpoint whose {KEY!r} holds policy and layers")
        try:
            layers = {str(name): QuantSpec(**spec) for name, spec in values["layers"].items()}
            others = {str(n): ProductsSpec(**spec) for n, spec in values.get("products", {}).items()}
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{argument}: its {KEY!r} is damaged ({error})") from error
        return cls(
            Policy.from_mapping(values["policy"]).to_mapping(),
            {name: asdict(spec) for name, spec in layers.items()},
            {name: asdict(spec) for name, spec in others.items()},
        )


def record_of(module: nn.Module) -> Record | None:
    """Returns what `quantize` has noted on a module."""
    found: Record | None = module.__dict__.get(_ATTRIBUTE)
    return found


def quantize(
    module: nn.Module,
    policy: Policy | Mapping[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    example: Any = None,  # noqa: ANN401 -- whatever the module takes
    forward: Callable[[Any], object] | None = None,
) -> ConversionReport:
    """Quantizes any module in place, as `convert.quantize_model`; checkpoints of a LightningModule say how.

    Call it before optimizers are built, so that they get the quantizers' parameters. Afterwards
    `MyModule.load_from_checkpoint` converts a fresh module by what the checkpoint says.

    Args:
        module: A network, or a LightningModule with networks inside.
        policy: Defaults, rules, parts (`modules`) and exclusions, see `convert.Policy`.
        calibration: Batches to fit input ranges to; without them the first batch in training does it.
        example: An input that tells first and last layers by order of execution.
        forward: How a batch of `calibration` is run, where the module does not take it as it is.

    Raises:
        ValueError: The policy is not allowed or quantizes nothing, or the module is quantized already.
    """
    if record_of(module) is not None:
        raise ValueError(
            f"module: got a {type(module).__name__} that is quantized already, allowed is one that is not"
        )
    policy = policy if isinstance(policy, Policy) else Policy.from_mapping(policy or {})
    report = quantize_model(module, policy, calibration, example=example, forward=forward)
    layers = {line.name: asdict(line.spec) for line in report.of(QUANTIZED) if line.spec is not None}
    products = {x.name: asdict(x.products) for x in report.of(QUANTIZED) if x.products is not None}
    note(module, Record(policy.to_mapping(), layers, products))
    return report


def restore(module: nn.Module, record: Record, argument: str = "checkpoint") -> None:
    """Quantizes exactly the layers of a record.

    Args:
        module: A module of the class that the record is about, not quantized.
        record: The record.
        argument: The user's name for where it comes from, used in errors.

    Raises:
        ValueError: The module has no such layer, or one that cannot be quantized.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    for name, spec in record.layers.items():
        try:
            layer, parent = module.get_submodule(name), module.get_submodule(name.rpartition(".")[0])
        except AttributeError:
            raise ValueError(
                f"{argument}: got a quantized layer {name!r}, which {type(module).__name__} does not have"
            ) from None
        if (problem := obstacle(layer, name, parent)) is not None:
            raise ValueError(
                f"{argument}: got a quantized layer {name!r}, which cannot be one here: {problem}"
            )
        replacements[layer] = quantized(layer, QuantSpec(**spec))
    around = {name: _host(module, name, replacements, argument) for name in record.products}
    swap(module, replacements)
    for name, spec in record.products.items():
        quantize_products(replacements.get(around[name], around[name]), ProductsSpec(**spec))
    note(module, record)


def _host(module: nn.Module, name: str, replacements: dict[nn.Module, nn.Module], argument: str) -> nn.Module:
    """Returns the module whose products are called `name`; torch's own layer gets its replacement."""
    try:
        host = module.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        raise ValueError(
            f"{argument}: got quantized products {name!r}, which {type(module).__name__} does not have"
        ) from None
    if (problem := products_obstacle(replacements.get(host, host))) is not None:
        raise ValueError(f"{argument}: got quantized products {name!r}, which cannot be so here: {problem}")
    if host not in replacements and (other := takes_products(host)) is not None:
        replacements[host] = other
    return host


def note(module: nn.Module, record: Record) -> None:
    """Keeps the record on the module; a LightningModule writes it into its checkpoints."""
    module.__dict__[_ATTRIBUTE] = record
    if hasattr(type(module), "on_save_checkpoint"):  # a LightningModule
        from lightning_n2uq.convert.loading import convert_when_loading

        convert_when_loading()
        module.__dict__["on_save_checkpoint"] = _SavesRecord(module)


class _SavesRecord:
    """The module's own `on_save_checkpoint`, and the record; copies and pickles go with the module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        type(self.module).on_save_checkpoint(self.module, checkpoint)  # type: ignore[attr-defined]
        if (record := record_of(self.module)) is not None:
            checkpoint[KEY] = record.to_mapping()
