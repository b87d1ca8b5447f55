"""Layers besides `Conv2d`, `Linear` and attention: types, what stands in the way, the quantized forms."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_n2uq.convert import convolutions as c
from lightning_n2uq.convert.fitted import quantizers_for
from lightning_n2uq.convert.recurrent import CELLS, LAYERS, QuantRecurrent, QuantRecurrentCell, make_recurrent
from lightning_n2uq.layers import QuantSpec
from lightning_n2uq.quantizers import Quantizer
from lightning_n2uq.quantizers.turned import TurnedWeight
from lightning_n2uq.utils import compat

_PLAIN: dict[type[nn.Module], type[nn.Module]] = {nn.Conv1d: c.QuantConv1d, nn.Conv3d: c.QuantConv3d}
_TRANSPOSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.ConvTranspose1d: c.QuantConvTranspose1d,
    nn.ConvTranspose2d: c.QuantConvTranspose2d,
    nn.ConvTranspose3d: c.QuantConvTranspose3d,
}
_RECURRENT = {**LAYERS, **CELLS}
_STANDARDIZED = ("ScaledStdConv2d", "ScaledStdConv2dSame", "StdConv2d", "StdConv2dSame")
QUANTIZED_FORMS = (
    *_PLAIN.values(),
    *_TRANSPOSED.values(),
    c.QuantConv1D,
    c.QuantStandardizedConv2d,
    QuantRecurrent,
    QuantRecurrentCell,
)


def is_standardized(layer: nn.Module) -> bool:
    """Returns whether a layer is one of timm's convolutions with standardized weights."""
    kind = type(layer)
    return (
        isinstance(layer, nn.Conv2d)
        and kind.__name__ in _STANDARDIZED
        and kind.__module__.startswith("timm.")
    )


def more_types(layer: nn.Module) -> tuple[str, ...]:
    """Returns what a layer is, in the words of `policy.TYPES`; nothing for one of another kind."""
    if _base(layer, _TRANSPOSED) is not None:
        return ("transposed",)
    if _base(layer, _PLAIN) is not None:
        return ("conv",)
    if _base(layer, _RECURRENT) is not None:
        return ("recurrent",)
    return ("linear",) if _is_conv1d(layer) or isinstance(layer, c.QuantConv1D) else ()


def more_obstacle(layer: nn.Module) -> str | None:
    """Returns why a layer of `more_types` cannot be converted, in words, or None."""
    for table in (_PLAIN, _TRANSPOSED, _RECURRENT):
        base = _base(layer, table)
        parts = ("forward", compat.CONV_FORWARD)
        changed = [p for p in parts if base and getattr(type(layer), p, None) is not getattr(base, p, None)]
        if changed:
            return f"{type(layer).__name__} computes its own {changed[0]}"
    if getattr(layer, "proj_size", 0):
        return "it projects its hidden state (proj_size)"
    return None


def more_quantized(layer: nn.Module, spec: QuantSpec) -> nn.Module:
    """Returns the quantized counterpart of a layer without obstacle; it shares the layer's parameters."""
    if (kind := _base(layer, _RECURRENT)) is not None:
        return make_recurrent(_reborn(_RECURRENT[kind], layer), spec)
    if is_standardized(layer):
        return _standardized(layer, spec)
    if (kind := _base(layer, _TRANSPOSED)) is not None or _is_conv1d(layer):
        new = _reborn(_TRANSPOSED[kind] if kind is not None else c.QuantConv1D, layer)
        return _turned(new, spec)
    kind = _base(layer, _PLAIN)
    new = _reborn(_PLAIN[kind], layer)  # type: ignore[index]
    new.weight_quantizer, new.activation_quantizer = quantizers_for(new.weight, spec)  # type: ignore[arg-type]
    return new


def _turned(new: Any, spec: QuantSpec) -> nn.Module:  # noqa: ANN401 -- a layer with a weight
    groups = getattr(new, "groups", 1)
    weight = new.weight.detach().unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    on_weight, new.activation_quantizer = quantizers_for(weight, spec)
    new.weight_quantizer = TurnedWeight(on_weight, groups) if isinstance(on_weight, Quantizer) else on_weight
    return new  # type: ignore[no-any-return]


def _standardized(layer: nn.Module, spec: QuantSpec) -> nn.Module:
    new: Any = _reborn(c.QuantStandardizedConv2d, layer)
    for name, value in (("gain", None), ("scale", 1.0), ("same_pad", False)):
        if not hasattr(new, name):
            setattr(new, name, value)
    if type(layer).__name__ == "StdConv2dSame":
        new.same_pad = layer.same_pad
    new.weight_quantizer, new.activation_quantizer = quantizers_for(new.effective_weight.detach(), spec)
    return new  # type: ignore[no-any-return]


def _reborn(kind: type[nn.Module], layer: nn.Module) -> nn.Module:
    """Returns a module of class `kind` with the attributes and the parameters of `layer`."""
    new = kind.__new__(kind)
    nn.Module.__init__(new)
    for name, value in vars(layer).items():
        if name not in vars(new):
            new.__dict__[name] = value
    for name, parameter in compat.own_parameters(layer).items():
        new.register_parameter(name, parameter)
    return new


def _base(layer: nn.Module, table: dict[type[nn.Module], Any]) -> type[nn.Module] | None:
    return next((kind for kind in table if isinstance(layer, kind)), None)


def _is_conv1d(layer: nn.Module) -> bool:
    """Returns whether it is Hugging Face's `Conv1D`, by name and shape: that package is not imported."""
    weight, outputs = getattr(layer, "weight", None), getattr(layer, "nf", None)
    if type(layer).__name__ != "Conv1D" or not isinstance(weight, nn.Parameter):
        return False
    return weight.dim() == 2 and weight.shape[1] == outputs
