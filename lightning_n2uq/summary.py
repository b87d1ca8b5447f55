"""What a network costs per layer: multiplications, bit operations, weight bytes, against full precision.

`n2uq summary --config imagenet/n2uq_resnet18_w2a2.yaml`
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from lightning_n2uq.convert.attention_products import AttentionProducts
from lightning_n2uq.convert.calibration import evaluating
from lightning_n2uq.convert.multiplications import multiplications
from lightning_n2uq.convert.replace import layer_types
from lightning_n2uq.layers.integer import by_reason, float_layers
from lightning_n2uq.quantizers import (
    SEQ,
    BinaryWeight,
    EntropyPreservingWeightQuantizer,
    LeastErrorWeight,
    Quantizer,
    StatsQ,
    TernaryWeight,
    UniformGrid,
)
from lightning_n2uq.quantizers.looks import looking

FLOAT_BITS = 32
_PER_CHANNEL = (EntropyPreservingWeightQuantizer, LeastErrorWeight, StatsQ, TernaryWeight, BinaryWeight)
SIZES = ("num_classes", "in_channels", "image_size")


@dataclass
class LayerCost:
    """Cost of one layer with weights, for one input.

    Attributes:
        name: Dotted name of the module.
        weight_method: Name of the weights' quantizer, `float` if there is none.
        weight_bits: Bits of a weight, 32 without a quantizer.
        activation_method: Name of the input's quantizer, `float` if there is none.
        activation_bits: Bits of an input, 32 without a quantizer.
        weights: Number of weights.
        scales: Number of factors that give the packed codes their size.
        biases: Number of biases, which stay in full precision.
        macs: Multiply-accumulates; those of norms and activations are not counted, and those of attention's
            products where they are quantized.
    """

    name: str
    weight_method: str
    weight_bits: int
    activation_method: str
    activation_bits: int
    weights: int
    scales: int
    biases: int
    macs: int = 0

    @property
    def bit_operations(self) -> int:
        """`macs * weight bits * activation bits`: work of bit-serial multiplication."""
        return self.macs * self.weight_bits * self.activation_bits

    @property
    def float_bit_operations(self) -> int:
        """`bit_operations` in full precision."""
        return self.macs * FLOAT_BITS * FLOAT_BITS

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed codes, scales and biases."""
        return ceil(self.weights * self.weight_bits / 8) + 4 * (self.scales + self.biases)

    @property
    def float_weight_bytes(self) -> int:
        """Bytes of weights and biases in float32."""
        return 4 * (self.weights + self.biases)


@dataclass
class ModelSummary:
    """Costs of all layers, and what is not in any of them.

    Attributes:
        layers: The layers in the order of the network's modules.
        other_parameters: Number of norms' parameters, slopes and thresholds, kept in float32.
        in_floats: Names of quantized layers whose training convolves floats on this machine, and reasons.
        grids: Bits of the grids on which maps between layers lie, by name; empty where they are real numbers.
    """

    layers: list[LayerCost]
    other_parameters: int
    in_floats: list[tuple[str, str]] = field(default_factory=list)
    grids: dict[str, int] = field(default_factory=dict)

    def total(self, what: str) -> int:
        """Returns the sum of a numeric attribute of `LayerCost`."""
        return sum(getattr(layer, what) for layer in self.layers)

    def packed_bytes(self) -> int:
        """Returns the bytes of all parameters, those of quantized layers packed."""
        return self.total("weight_bytes") + 4 * self.other_parameters

    def float_bytes(self) -> int:
        """Returns the bytes of all parameters in float32."""
        return self.total("float_weight_bytes") + 4 * self.other_parameters

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("layer", "weights", "inputs", "MACs", "bit operations", "weight bytes", "of float")
        ]
        rows += [_row(layer) for layer in self.layers]
        operations, size = self.total("bit_operations"), self.total("weight_bytes")
        share = _share(size, self.total("float_weight_bytes"))
        rows.append(("total", "", "", f"{self.total('macs'):,}", f"{operations:,}", f"{size:,}", share))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        rest = 4 * self.other_parameters
        lines += [
            f"bit operations: {_share(operations, self.total('float_bit_operations'))} of float's "
            f"({self.total('float_bit_operations'):,})",
            f"beside the layers: {self.other_parameters:,} parameters (norms, slopes, thresholds), "
            f"{rest:,} bytes",
            f"all together: {self.packed_bytes():,} bytes, "
            f"{_share(self.packed_bytes(), self.float_bytes())} of float's",
        ]
        lines += [f"training in floats here: {line}" for line in by_reason(self.in_floats)]
        if self.grids:
            bits = " and ".join(map(str, sorted(set(self.grids.values()))))
            lines.append(f"maps between blocks: on {len(self.grids)} learned grids of {bits} bits")
        return "\n".join(lines)


def _row(layer: LayerCost) -> tuple[str, ...]:
    return (
        layer.name,
        f"{layer.weight_method} {layer.weight_bits}",
        f"{layer.activation_method} {layer.activation_bits}",
        f"{layer.macs:,}",
        f"{layer.bit_operations:,}",
        f"{layer.weight_bytes:,}",
        _share(layer.weight_bytes, layer.float_weight_bytes),
    )


@torch.no_grad()
def summarize(model: nn.Module, input_shape: Sequence[int]) -> ModelSummary:
    """Counts the costs of `model` for one input, by running it once on zeros.

    Args:
        model: A network with `Conv2d`, `Linear`, `MultiheadAttention` layers, quantized or not; unchanged.
        input_shape: The shape of one input, `[C, H, W]` for images.

    Raises:
        ValueError: The network does not take such an input.
    """
    first = next(model.parameters())
    return _summarize(model, (torch.zeros(1, *input_shape, device=first.device, dtype=first.dtype),), {})


@torch.no_grad()
def summarize_example(model: nn.Module, example: Any) -> ModelSummary:  # noqa: ANN401 -- what the model takes
    """Counts the costs of `model` for an example: a tuple of arguments, keywords, or one argument."""
    if isinstance(example, Mapping):
        return _summarize(model, (), dict(example))
    return _summarize(model, example if isinstance(example, tuple) else (example,), {})


def _summarize(model: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> ModelSummary:
    costs = {module: _layer_cost(name, module) for name, module in _layers(model)}
    with _counting(model, costs):
        try:
            model(*args, **keywords)
        except RuntimeError as error:
            shapes = [list(x.shape[1:]) for x in (*args, *keywords.values()) if isinstance(x, Tensor)]
            shown = ", ".join(map(str, shapes))
            raise ValueError(f"input_shape: got {shown}, the network refuses: {error}") from error
    return _totals(model, list(costs.values()))


def weigh(model: nn.Module) -> ModelSummary:
    """Returns the sizes of a network that is not run: the multiplications stay 0."""
    return _totals(model, [_layer_cost(name, module) for name, module in _layers(model)])


def _totals(model: nn.Module, costs: list[LayerCost]) -> ModelSummary:
    inside = sum(cost.weights + cost.biases for cost in costs)
    others = sum(p.numel() for p in model.parameters()) - inside
    return ModelSummary(costs, others, list(float_layers(model)), _map_grids(model))


def _map_grids(model: nn.Module) -> dict[str, int]:
    """Returns the bits of grids that belong to no layer."""
    return {
        name: module.bits
        for name, module in model.named_modules()
        if isinstance(module, UniformGrid) and not name.endswith("_quantizer")
    }


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside_attention: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, AttentionProducts):
            yield name, module
        if module in inside_attention:
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside_attention.update(module.modules())
        if isinstance(module, nn.MultiheadAttention) or layer_types(module):
            yield name, module


def _layer_cost(name: str, module: nn.Module) -> LayerCost:
    if isinstance(module, AttentionProducts):  # both operands are activations
        return LayerCost(name, *_method(module.key), *_method(module.query), weights=0, scales=0, biases=0)
    own = [(name.rpartition(".")[2], p) for name, p in module.named_parameters()]
    tensors = [p for n, p in own if n.endswith(("weight", "bias")) or n.startswith(("weight_", "bias_"))]
    weights = [p for p in tensors if p.dim() > 1]
    weight, activation = (getattr(module, f"{kind}_quantizer", None) for kind in ("weight", "activation"))
    if hasattr(module, "weight_quantizers"):  # of a recurrent layer, all alike
        weight = next(module.get_submodule("weight_quantizers").children())
    per_channel = isinstance(weight, _PER_CHANNEL) or (isinstance(weight, SEQ) and weight.alpha.numel() > 1)
    quantized = isinstance(weight, Quantizer)
    return LayerCost(
        name,
        *_method(weight),
        *_method(activation),
        weights=sum(p.numel() for p in weights),
        scales=sum(len(p) if per_channel else 1 for p in weights) * quantized,
        biases=sum(p.numel() for p in tensors if p.dim() == 1),
    )


def _method(quantizer: nn.Module | None) -> tuple[str, int]:
    return (quantizer.name, quantizer.bits) if isinstance(quantizer, Quantizer) else ("float", FLOAT_BITS)


@contextmanager
def _counting(model: nn.Module, costs: dict[nn.Module, LayerCost]) -> Iterator[None]:
    """Makes forward passes looks in evaluation mode, whose multiplications are added to the layers' costs."""
    with evaluating(model), looking(), ExitStack() as stack:
        for module, cost in costs.items():
            stack.callback(module.register_forward_hook(_counter(cost)).remove)
        yield


def _counter(cost: LayerCost) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:  # noqa: ANN401
        cost.macs += multiplications(module, cost.weights, inputs, output)

    return count


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"


def main(argv: Sequence[str]) -> int:
    """`n2uq summary --config FILE [--num_classes N --in_channels C --image_size S] [options of fit]`.

    Classes, channels and size come from the config's data module; the three options replace them, for
    example where the data are not on this machine.
    """
    from lightning_n2uq.cli.arguments import resolve_arguments
    from lightning_n2uq.cli.own_code import check_importable, class_of, see_current_folder
    from lightning_n2uq.cli.quiet import quiet_lightning

    quiet_lightning()
    see_current_folder()
    parser = argparse.ArgumentParser("n2uq summary", description=main.__doc__, allow_abbrev=False)
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, default=None)
    sizes, rest = parser.parse_known_args(list(argv))
    if not any(part.startswith(("--config", "-c")) for part in rest):
        raise ValueError(
            "config: got none, n2uq summary --config FILE; n2uq configs lists those of the package"
        )
    arguments, paths = resolve_arguments(rest)
    check_importable(paths, arguments)
    config = _parsed(arguments, paths)
    given = {name: value for name, value in vars(sizes).items() if value is not None}
    taken = inspect.signature(class_of(config.model.class_path)).parameters
    wanted = set(SIZES) & set(taken)
    if wanted == set(SIZES):
        given = {**_data_sizes(config.data, wanted - set(given)), **given}
        network = _instantiate(config.model, given)
        shape = (given["in_channels"], given["image_size"], given["image_size"])
        print(summarize(getattr(network, "backbone", network), shape))
    else:
        network = _instantiate(config.model, {key: value for key, value in given.items() if key in taken})
        print(_summary_of_any(network, config))
    if evaluation := getattr(network, "evaluation", None):
        print(f"evaluation on the CPU: {evaluation()}")
    return 0


def _summary_of_any(module: Any, config: Any) -> ModelSummary:  # noqa: ANN401 -- a LightningModule, a namespace
    """Returns the costs of a user's own module, quantized as the config's `QuantizeModel` says."""
    from lightning_n2uq.callbacks import QuantizeModel
    from lightning_n2uq.convert.record import quantize

    module.configure_model()
    callbacks = config.trainer.callbacks or []
    found = [c for c in callbacks if c.class_path.rpartition(".")[2] == QuantizeModel.__name__]
    callback = _instantiate(found[0], {}) if found else None
    shape = None if callback is None else callback.input_shape
    example = module.example_input_array if shape is None else torch.zeros(shape)
    if example is None:
        raise ValueError(
            f"model: got {type(module).__name__} without example_input_array, allowed is one with it, or "
            "QuantizeModel with input_shape: the network is run once to count its multiplications"
        )
    if callback is not None:
        print(quantize(module, callback.policy, example=example))
    return summarize_example(module, example)


def _parsed(arguments: list[str], paths: list[str]) -> Any:  # noqa: ANN401 -- a jsonargparse namespace
    from lightning_n2uq.cli.training import N2UQCLI

    class ParsingOnly(N2UQCLI):
        def before_instantiate_classes(self) -> None:
            """No run folder."""

        def instantiate_classes(self) -> None:
            """No objects."""

        def _run_subcommand(self, subcommand: str) -> None:
            """No run."""

    return ParsingOnly("fit", arguments, paths).config["fit"]


def _data_sizes(data: Any, wanted: set[str]) -> dict[str, int]:  # noqa: ANN401
    if not wanted:
        return {}
    try:
        module = _instantiate(data, {})
    except (ValueError, OSError) as error:
        options = " ".join(f"--{name} N" for name in sorted(wanted))
        raise ValueError(f"data: {error}; without the data, give {options}") from error
    return {name: getattr(module, name) for name in wanted}


def _instantiate(config: Any, extra: dict[str, int]) -> Any:  # noqa: ANN401
    module, _, name = config.class_path.rpartition(".")
    return getattr(import_module(module), name)(**{**config.get("init_args", {}).as_dict(), **extra})
