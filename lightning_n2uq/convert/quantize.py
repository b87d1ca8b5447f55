"""`quantize_model`: any network with convolutions and linear layers to a quantized one, by a policy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_n2uq.convert.calibration import MAX_BATCHES, calibrate
from lightning_n2uq.convert.policy import Layer, Policy
from lightning_n2uq.convert.replace import layer_types, obstacle, quantized
from lightning_n2uq.convert.report import EXCLUDED, QUANTIZED, UNSUPPORTED, ConversionReport, LayerReport
from lightning_n2uq.utils.compat import submodules


def quantize_model(
    model: nn.Module,
    policy: Policy | Mapping[str, Any] | None = None,
    calibration: Iterable[Tensor | tuple[Tensor, ...] | list[Tensor]] | None = None,
    max_batches: int = MAX_BATCHES,
) -> ConversionReport:
    """Replaces `Conv2d`, `Linear` and `MultiheadAttention` in `model`, in place, by quantized layers.

    Weights are kept (the same parameters, so that an optimizer built before still holds them) under the same
    state-dict keys; quantizer parameters come beside them. Without `calibration`, input ranges are fitted to
    the first batch in training.

    Args:
        model: Any network; it is tested with torchvision's and timm's classifiers.
        policy: Defaults and rules, or a mapping with the same keys; the default is N2UQ with 4 bits that
            leaves out the first and the last layer.
        calibration: Batches for `calibrate`, inputs alone or first in a tuple.
        max_batches: The largest number of batches to use.

    Returns:
        What became of every layer with weights; `report.model` is `model`.

    Raises:
        ValueError: The policy is not allowed, the model is itself a single layer, or the data cannot be used.

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
    layers = _candidates(model)
    report = ConversionReport(model, [])
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in _weighted_modules(model):
        if module not in layers:
            reason = "its parameters belong to no convertible layer"
            report.layers.append(_line(name, module, UNSUPPORTED, reason))
            continue
        line, new = _convert(layers[module], module, policy, model)
        report.layers.append(line)
        if new is not None:
            replacements[module] = new
    _swap(model, replacements)
    _disable_fused_inference(model)
    if calibration is not None:
        _note_ranges(report, calibrate(model, calibration, max_batches))
    return report


def _weighted_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Yields modules with a parameter of their own that has more than one dimension above 1.

    An attention layer stands for its output projection as well.
    """
    inside_attention: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside_attention or "parametrizations" in name.split("."):
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside_attention.update(module.modules())
        own = module.parameters(recurse=False)
        if layer_types(module) or any(sum(n > 1 for n in parameter.shape) > 1 for parameter in own):
            yield name, module


def _candidates(model: nn.Module) -> dict[nn.Module, Layer]:
    found = [(name, module) for name, module in _weighted_modules(model) if layer_types(module)]
    return {module: Layer(name, layer_types(module), i, len(found)) for i, (name, module) in enumerate(found)}


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


def _swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Puts the new layers in every place where the old ones are: a layer may be shared."""
    for parent in list(model.modules()):
        for name, child in list(submodules(parent).items()):
            if child in replacements:
                setattr(parent, name, replacements[child])


def _disable_fused_inference(model: nn.Module) -> None:
    """Switches off `TransformerEncoderLayer`'s fused path in evaluation, which reads raw weights."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # the condition that switches it off


def _note_ranges(report: ConversionReport, ranges: dict[str, tuple[float, float]]) -> None:
    unreached = []
    for line in report.of(QUANTIZED):
        line.input_range = ranges.get(f"{line.name}.activation_quantizer")
        if line.input_range is None and not line.activation.startswith("float"):
            line.reason += "; no calibration batch reached it"
            unreached.append(line.name)
    if unreached:
        warnings.warn(
            f"quantize_model: {', '.join(unreached)}: no calibration batch ran through; what reads such a "
            "layer's weight without calling the layer reads floats",
            stacklevel=3,
        )
