"""`quantize_model`: any network with convolutions and linear layers to a quantized one, by a policy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from lightning_n2uq.convert.attention_hosts import hosts, products_obstacle, quantize_products, takes_products
from lightning_n2uq.convert.calibration import MAX_BATCHES, calibrate
from lightning_n2uq.convert.candidates import candidates, weighted_modules
from lightning_n2uq.convert.policy import Layer, Policy
from lightning_n2uq.convert.replace import ALREADY, layer_types, obstacle, quantized
from lightning_n2uq.convert.report import EXCLUDED, QUANTIZED, UNSUPPORTED, ConversionReport, LayerReport
from lightning_n2uq.utils.compat import submodules


def quantize_model(
    model: nn.Module,
    policy: Policy | Mapping[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    max_batches: int = MAX_BATCHES,
    example: Any = None,  # noqa: ANN401 -- whatever the model takes
    forward: Callable[[Any], object] | None = None,
) -> ConversionReport:
    """Replaces convolutions, linear, attention and recurrent layers in `model`, in place, by quantized ones.

    Attention's two products are quantized where the policy has `attention_bits`. Weights are kept (the same
    parameters, so that an optimizer built before still holds them) under the same state-dict keys; quantizer
    parameters come beside them, frozen where the layer's weight is. Without `calibration`, input ranges are
    fitted to the first batch in training.

    Args:
        model: Any network; it is tested with torchvision's, timm's and Hugging Face's.
        policy: Defaults and rules, or a mapping with the same keys; the default is N2UQ with 4 bits that
            leaves out the first and the last layer.
        calibration: Batches for `calibrate`.
        max_batches: The largest number of batches to use.
        example: An input, which is run once to find the first and the last layers: a tuple of positional
            arguments, a mapping of keywords, or one argument. Without it (and without the attribute
            `example_input_array` of LightningModules) the order of registration decides; the report says so.
        forward: How `calibrate` runs a batch, where the model does not take it as it is.

    Returns:
        What became of every layer with weights; `report.model` is `model`.

    Raises:
        ValueError: The policy is not allowed or quantizes nothing, the model is itself a single layer, or the
            data cannot be used.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
        >>> quantize_model(net, {"weight_bits": 2, "activation_bits": 2}).quantized
        ['1']
    """
    if not isinstance(policy, Policy):
        policy = Policy.from_mapping(policy or {})
    if layer_types(model):
        raise ValueError(
            f"model: got a single {type(model).__name__}, allowed is a network that contains layers"
        )
    example = getattr(model, "example_input_array", None) if example is None else example
    layers = candidates(model, policy.modules, example)
    report = ConversionReport(model, [])
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in weighted_modules(model, policy.modules):
        if module not in layers:
            reason = "its parameters belong to no convertible layer"
            report.layers.append(_line(name, module, UNSUPPORTED, reason))
            continue
        line, new = _convert(layers[module], module, policy, model)
        report.layers.append(line)
        if new is not None:
            replacements[module] = new
    found = _products(model, policy, replacements) if policy.asks_for_products else []
    report.layers += [line for line, _ in found]
    _check_something(report, policy)
    asked = [(line.products, host) for line, host in found if line.products is not None]
    for _, host in asked:
        if host not in replacements and (other := takes_products(host)) is not None:
            replacements[host] = other
    swap(model, replacements)
    for spec, host in asked:
        quantize_products(replacements.get(host, host), spec)
    if calibration is not None:
        _note_ranges(report, calibrate(model, calibration, max_batches, forward))
    return report


def _products(
    model: nn.Module, policy: Policy, replacements: Mapping[nn.Module, nn.Module]
) -> list[tuple[LayerReport, nn.Module]]:
    """Returns what becomes of the products of each attention, with the module around them."""
    found = []
    for layer, module in hosts(model, policy.modules):
        spec, reason = policy.decide_products(layer)
        problem = products_obstacle(replacements.get(module, module)) if spec is not None else None
        status = EXCLUDED if spec is None else QUANTIZED if problem is None else UNSUPPORTED
        line = LayerReport(layer.name, type(module).__name__, status, problem or reason)
        if status == QUANTIZED and spec is not None:
            line.products, line.activation = spec, str(spec)
        found.append((line, module))
    failed = [line for line, _ in found if line.status == UNSUPPORTED]
    if not found or len(failed) == len(found):
        why = f"; {failed[0].name}: {failed[0].reason}" if failed else ""
        raise ValueError(
            f"attention_bits: got {policy.attention_bits}, but {type(model).__name__} has no attention whose "
            f"products can be quantized{why}"
        )
    if failed:
        warnings.warn(
            f"attention_bits: products of {failed[0].name} ({failed[0].reason}) stay in full precision"
            + (f", and those of {len(failed) - 1} more" if len(failed) > 1 else ""),
            stacklevel=3,
        )
    return found


def _check_something(report: ConversionReport, policy: Policy) -> None:
    """Refuses a policy under which nothing is quantized, unless it asks for floats."""
    spec = policy.spec()
    if spec.weight_quantizer == spec.activation_quantizer == "float":
        return
    if report.quantized or any(line.reason == ALREADY for line in report.layers):
        return
    reasons: dict[str, list[str]] = {}
    for line in report.layers:
        reasons.setdefault(f"{line.type}: {line.reason}", []).append(line.name)
    shown = "; ".join(
        f"{names[0]} and {len(names) - 1} more {reason}" if len(names) > 1 else f"{names[0]} {reason}"
        for reason, names in list(reasons.items())[:4]
    )
    raise ValueError(
        f"policy: got one that quantizes nothing in {type(report.model).__name__} ({shown or 'no layers'}), "
        "allowed is one that quantizes a layer"
    )


def _convert(
    layer: Layer, module: nn.Module, policy: Policy, model: nn.Module
) -> tuple[LayerReport, nn.Module | None]:
    spec, reason = policy.decide(layer)
    if spec is None:
        return _line(layer.name, module, EXCLUDED, reason), None
    parent = model.get_submodule(layer.name.rpartition(".")[0])
    if (problem := obstacle(module, layer.name, parent)) is not None:
        return _line(layer.name, module, UNSUPPORTED, problem), None
    line = _line(layer.name, module, QUANTIZED, reason + _other_readers(model, module))
    line.spec = spec
    line.weight = f"{spec.weight_quantizer} {spec.weight_bits}"
    line.activation = f"{spec.activation_quantizer} {spec.activation_bits}"
    return line, quantized(module, spec)


def _other_readers(model: nn.Module, module: nn.Module) -> str:
    """Says where else a layer's weight is registered: whoever reads it there reads floats."""
    weight = getattr(module, "weight", None)
    others = [
        f"{name}.{own}" if name else own
        for name, other in model.named_modules()
        if other is not module
        for own, parameter in other.named_parameters(recurse=False)
        if parameter is weight
    ]
    return (
        f"; its weight is also {', '.join(others)}, which reads floats"
        if others and weight is not None
        else ""
    )


def _line(name: str, module: nn.Module, status: str, reason: str) -> LayerReport:
    recurse = isinstance(module, nn.MultiheadAttention)
    size = sum(parameter.numel() for parameter in module.parameters(recurse=recurse))
    return LayerReport(name, type(module).__name__, status, reason, parameters=size)


def swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Puts the new layers in every place where the old ones are: a layer may be shared."""
    for parent in list(model.modules()):
        for name, child in list(submodules(parent).items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    _disable_fused_inference(model)


def _disable_fused_inference(model: nn.Module) -> None:
    """Switches off `TransformerEncoderLayer`'s fused path in evaluation, which reads raw weights.

    `TransformerEncoder` hands nested tensors to that path, which nothing else takes.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # the condition that switches it off
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _note_ranges(report: ConversionReport, ranges: dict[str, tuple[float, float]]) -> None:
    unreached = []
    for line in report.of(QUANTIZED):
        operand = "query" if line.products is not None else "activation_quantizer"
        line.input_range = ranges.get(f"{line.name}.{operand}")
        if line.input_range is None and not line.activation.startswith("float"):
            line.reason += "; no calibration batch reached it"
            unreached.append(line.name)
    if unreached:
        warnings.warn(
            f"quantize_model: {', '.join(unreached)}: no calibration batch ran through; what reads such a "
            "layer's weight without calling the layer reads floats",
            stacklevel=3,
        )
