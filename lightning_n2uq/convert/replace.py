"""One float layer to its quantized counterpart: same parameters, same state-dict keys, quantizers beside."""

from __future__ import annotations

import contextlib
import inspect
import re
from functools import cache
from typing import cast

import torch
from torch import nn

from lightning_n2uq.convert.attention import QuantMultiheadAttention
from lightning_n2uq.convert.fitted import quantizers_for
from lightning_n2uq.convert.more_layers import (
    QUANTIZED_FORMS,
    is_standardized,
    more_obstacle,
    more_quantized,
    more_types,
)
from lightning_n2uq.layers import QuantConv2d, QuantLinear, QuantSpec
from lightning_n2uq.quantizers import Quantizer
from lightning_n2uq.utils import compat

ALREADY = "is quantized already"


def layer_types(layer: nn.Module) -> tuple[str, ...]:
    """Returns what a layer is, in the words of `policy.TYPES`; nothing for one that is never converted."""
    if isinstance(layer, nn.MultiheadAttention):
        return ("attention",)
    if isinstance(layer, nn.Linear):
        return ("linear",)
    if not isinstance(layer, nn.Conv2d):
        return more_types(layer)
    if layer.groups > 1 and layer.groups == layer.in_channels:
        return ("depthwise", "conv")
    return ("pointwise", "conv") if layer.kernel_size == (1, 1) else ("conv",)


def obstacle(layer: nn.Module, name: str, parent: nn.Module) -> str | None:
    """Returns why `layer` cannot be converted, in words, or None."""
    if isinstance(layer, (QuantConv2d, QuantLinear, QuantMultiheadAttention, *QUANTIZED_FORMS)):
        return ALREADY
    if "forward" in vars(layer):
        return "its forward was replaced on this one layer"
    if isinstance(layer, nn.MultiheadAttention):
        return _attention_obstacle(layer)
    if isinstance(layer, nn.Conv2d | nn.Linear) and not is_standardized(layer):
        base = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
        changed = [part for part in ("forward", compat.CONV_FORWARD) if _overrides(layer, base, part)]
        if changed:
            return f"{type(layer).__name__} computes its own {changed[0]}"
    elif (reason := more_obstacle(layer)) is not None:
        return reason
    if hasattr(layer, "parametrizations") or not any(
        name.startswith("weight") for name, _ in layer.named_parameters(recurse=False)
    ):
        return "its weight is computed by a parametrization"
    if _used_from_outside(parent, name.rpartition(".")[2]):
        return f"{type(parent).__name__} reads its weight instead of calling it"
    return None


def quantized(layer: nn.Module, spec: QuantSpec) -> nn.Module:
    """Returns the quantized counterpart of a layer without `obstacle`; it shares the layer's parameters."""
    if isinstance(layer, nn.MultiheadAttention):
        new: nn.Module = _attention(layer, spec)
    elif isinstance(layer, nn.Conv2d) and not is_standardized(layer):
        new = _convolution(layer, spec)
    elif isinstance(layer, nn.Linear):
        new = _linear(layer, spec)
    else:
        new = more_quantized(layer, spec)
    _carry_over(new, layer)
    _freeze_like(new, layer)
    return new.train(layer.training)


def _freeze_like(new: nn.Module, layer: nn.Module) -> None:
    """Freezes the quantizers of a layer whose weight is frozen."""
    weights = [p for name, p in layer.named_parameters(recurse=False) if "weight" in name]
    if not any(weight.requires_grad for weight in weights):
        for module in new.modules():
            if isinstance(module, Quantizer):
                module.requires_grad_(False)


def _carry_over(new: nn.Module, layer: nn.Module) -> None:
    """Gives the new layer what users have put on the old one: hooks, buffers, submodules, attributes."""
    for name, value in vars(layer).items():
        # Hooks are shared, so that the handles that users hold still remove them.
        if vars(new).get(name) is None or ("hooks" in name and isinstance(value, dict)):
            new.__dict__[name] = value
    own = dict(new.named_buffers(recurse=False))
    persistent = layer.state_dict(keep_vars=True)
    for name, buffer in layer.named_buffers(recurse=False):
        if name not in own:
            new.register_buffer(name, buffer, persistent=name in persistent)
    for name, parameter in layer.named_parameters(recurse=False):
        if name not in dict(new.named_parameters(recurse=False)):
            new.register_parameter(name, parameter)
    for name, child in layer.named_children():
        if name not in dict(new.named_children()):
            new.add_module(name, child)


def _convolution(layer: nn.Conv2d, spec: QuantSpec) -> QuantConv2d:
    with torch.device("meta"):  # no memory, no random numbers: the parameters are replaced below
        new = QuantConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            layer.bias is not None,
        )
    compat.copy_padding(new, layer)
    _share(new, layer, spec)
    return new


def _linear(layer: nn.Linear, spec: QuantSpec) -> QuantLinear:
    with torch.device("meta"):
        new = QuantLinear(layer.in_features, layer.out_features, layer.bias is not None)
    _share(new, layer, spec)
    return new


def _share(new: QuantConv2d | QuantLinear, layer: nn.Conv2d | nn.Linear, spec: QuantSpec) -> None:
    new.weight, new.bias = layer.weight, layer.bias
    new.weight_quantizer, new.activation_quantizer = quantizers_for(layer.weight, spec)


def _attention(layer: nn.MultiheadAttention, spec: QuantSpec) -> QuantMultiheadAttention:
    on_weight, on_input = quantizers_for(layer.in_proj_weight, spec)
    out_proj = _linear(cast(nn.Linear, layer.out_proj), spec)
    bias = layer.in_proj_bias is not None
    with torch.device("meta"):
        new = QuantMultiheadAttention(
            layer.embed_dim,
            layer.num_heads,
            layer.dropout,
            bias,
            layer.batch_first,
            on_weight,
            on_input,
            out_proj,
        )
    new.in_proj_weight, new.in_proj_bias = layer.in_proj_weight, layer.in_proj_bias
    return new


def _attention_obstacle(layer: nn.MultiheadAttention) -> str | None:
    if type(layer) is not nn.MultiheadAttention:
        return f"{type(layer).__name__} computes its own attention"
    if not compat.one_width(layer):
        return "keys or values have another width than queries"
    if layer.bias_k is not None or layer.add_zero_attn:
        return "adds a bias or zeros to keys and values"
    return None


def _overrides(layer: nn.Module, base: type[nn.Module], method: str) -> bool:
    return getattr(type(layer), method, None) is not getattr(base, method, None)


def _used_from_outside(parent: nn.Module, child: str) -> bool:
    """Returns whether the parent's forward pass reads `self.<child>.weight`, past a replacement."""
    return re.search(rf"\bself\.{re.escape(child)}\.weight\b", _forward_source(type(parent))) is not None  # type: ignore[arg-type]


@cache
def _forward_source(kind: type[nn.Module]) -> str:
    """Returns the source of a class's own forward methods, as far as it can be had."""
    texts = []
    for name in dir(kind):
        method = getattr(kind, name)
        if "forward" in name and method is not getattr(nn.Module, name, None):
            with contextlib.suppress(TypeError, OSError):  # not written in Python, or without a file
                texts.append(inspect.getsource(method))
    return "\n".join(texts)
