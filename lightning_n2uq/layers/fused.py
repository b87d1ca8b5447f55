"""Decides when layers take the fused training path, which keeps less for the backward pass, and calls it.

The fused path is taken where the plain modules, called one after the other, would do nothing else: training
mode, single or half precision, quantizers that tell their grid (N2UQ's with hard thresholds; uniform ones on
integers), ordinary batch norms, no hooks on the modules that would be skipped, and kernels for the device. In
evaluation mode these layers are plain. Values and gradients
are those of the plain path, except behind a batch norm, whose last bits differ: the fused one sums its
statistics in float64. Under autocast maps between blocks keep the dtype of the convolutions.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_n2uq.layers import exact
from lightning_n2uq.layers.integer import integer_backend, integer_weight_known
from lightning_n2uq.layers.prelu import BiasedPReLU
from lightning_n2uq.layers.recompute import recomputed
from lightning_n2uq.ops.dispatch import load, select
from lightning_n2uq.ops.formats.fused_activation import NormParameters, PReLUParameters, Window
from lightning_n2uq.ops.fused_activation import OP as ACTIVATION
from lightning_n2uq.ops.fused_activation import packed_activation
from lightning_n2uq.ops.fused_conv import Geometry, PackedInput, QuantizedWeight, packed_conv2d
from lightning_n2uq.ops.quantized_conv import LeveledWeight, quantized_conv2d
from lightning_n2uq.ops.residual import OP as RESIDUAL
from lightning_n2uq.ops.residual import residual_activation
from lightning_n2uq.ops.stem import OP as STEM
from lightning_n2uq.ops.stem import norm_relu_pool
from lightning_n2uq.ops.tables import QuantizerParameters
from lightning_n2uq.ops.uniform import UniformParameters
from lightning_n2uq.ops.weight import quantize_weight_with_scale
from lightning_n2uq.quantizers.base import Quantizer
from lightning_n2uq.quantizers.n2uq import EntropyPreservingWeightQuantizer, LearnableThresholdQuantizer
from lightning_n2uq.utils.compat import constant_in_graphs, convolve, has_hooks

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FusibleConv2d(nn.Conv2d):
    """A convolution with a quantizer for its weight and one for its input; the constructor is `Conv2d`'s."""

    weight_quantizer: nn.Module
    activation_quantizer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, C_in, H, W]` to `[N, C_out, H', W']`, dtype of `x` (autocast's under autocast)."""
        if (grid := _grid(self, x)) is not None:
            return _fused_conv(x, None, None, grid, self)
        if (shifted := _shifted_conv(self, x)) is not None:
            return shifted
        if exact.takes(self, x):
            return exact.convolution(self, x)
        y: Tensor = self.activation_quantizer(x)
        return convolve(self, y, self.weight_quantizer(self.weight), self.bias)


def norm_act_conv(x: Tensor, norm: nn.Module | None, act: nn.Module, conv: nn.Module) -> Tensor:
    """Returns `conv(act(norm(x)))`, fused if these are batch norm (or None), `BiasedPReLU`, `QuantConv2d`."""
    if _ordinary_act(act) and _ordinary_conv(conv) and (grid := _grid(conv, x)) is not None:
        if norm is None or _ordinary_norm(norm):
            return _fused_conv(x, norm, act, grid, conv)
        return _fused_conv(norm(x), None, act, grid, conv)
    return conv(act(x if norm is None else norm(x)))  # type: ignore[no-any-return]


def norm_add_act(
    x: Tensor, norm: nn.Module, shortcut: Tensor, other: nn.Module | None, act: nn.Module
) -> Tensor:
    """Returns `act(norm(x) + other(shortcut))`, fused if the norms and the activation are the usual ones.

    Args:
        x: `[N, C, H, W]`.
        norm: The norm of `x`.
        shortcut: A map of the shape of `x`.
        other: The norm of the shortcut, or None.
        act: The activation, usually a `BiasedPReLU`.
    """
    if not (
        _suits(x, RESIDUAL)
        and x.shape == shortcut.shape
        and _ordinary_act(act)
        and _ordinary_norm(norm)
        and (other is None or _ordinary_norm(other))
    ):
        return act(norm(x) + (shortcut if other is None else other(shortcut)))  # type: ignore[no-any-return]
    second = None if other is None else _norm_parameters(other)
    y, stats, other_stats = residual_activation(
        x, _norm_parameters(norm), shortcut, second, _prelu_parameters(act)
    )
    _update_running_stats(norm, stats, x)
    if other is not None:
        _update_running_stats(other, other_stats, shortcut)
    return y


def norm_act_pool(x: Tensor, norm: nn.Module, act: nn.Module, pool: nn.Module) -> Tensor:
    """Returns `pool(act(norm(x)))`, fused if the three are batch norm, ReLU, max pooling."""
    window = _pool_window(act, pool)
    if window is None or not (_suits(x, STEM) and _ordinary_norm(norm)):
        return pool(act(norm(x)))  # type: ignore[no-any-return]
    y, stats = norm_relu_pool(x, _norm_parameters(norm), window)
    _update_running_stats(norm, stats, x)
    return y


def _suits(x: Tensor, op: str = ACTIVATION) -> bool:
    """Returns whether a fused operator takes `x`: `[N, C, H, W]`, not empty, single or half precision."""
    return (
        x.dim() == 4 and x.dtype in _DTYPES and x.numel() > x.shape[1] and select(op, x.device) != "reference"
    )


@constant_in_graphs
def _most_bits(device: torch.device) -> int:
    """Returns up to how many bits a quantizer may have on the fused path of a device; 0 for none."""
    bits: int = load(ACTIVATION, device).MOST_BITS
    return bits


def _ordinary_act(act: nn.Module) -> TypeGuard[BiasedPReLU]:
    return type(act) is BiasedPReLU and not has_hooks(act)


def _ordinary_conv(conv: nn.Module) -> TypeGuard[FusibleConv2d]:
    """Returns whether calling `conv` would run `FusibleConv2d.forward` and nothing else."""
    return (
        isinstance(conv, FusibleConv2d)
        and type(conv).forward is FusibleConv2d.forward
        and not has_hooks(conv)
    )


def _ordinary_norm(norm: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Returns whether `norm` is torch's batch norm in training, with all that the fused one needs."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and norm.weight.dtype in _DTYPES
        and not has_hooks(norm)
    )


def _pool_window(act: nn.Module, pool: nn.Module) -> Window | None:
    """Returns kernel, stride and padding if these are ReLU and a max pooling that the operator knows."""
    if type(act) is not nn.ReLU or type(pool) is not nn.MaxPool2d or has_hooks(act, pool):
        return None
    kernel, stride, padding = pool.kernel_size, pool.stride, pool.padding
    if not (isinstance(kernel, int) and isinstance(stride, int) and isinstance(padding, int)):
        return None
    plain = pool.dilation == 1 and not pool.ceil_mode and not pool.return_indices
    return Window(kernel, stride, padding) if plain and kernel <= 15 else None


def _code_quantizer(conv: FusibleConv2d, quantizer: nn.Module) -> Quantizer | None:
    """Returns the activation quantizer if the convolution's input can be kept as its codes, else None."""
    suitable = (
        isinstance(quantizer, Quantizer)
        and conv.training
        and quantizer.training
        and quantizer.tells_grid
        and quantizer.bits <= _most_bits(conv.weight.device)
        and all(p.dtype in _DTYPES for p in quantizer.parameters(recurse=False))
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
        and conv.weight.dtype in _DTYPES
        and not has_hooks(quantizer)
    )
    return quantizer if suitable else None  # type: ignore[return-value]


def _grid(
    conv: FusibleConv2d, x: Tensor, quantizer: nn.Module | None = None
) -> QuantizerParameters | UniformParameters | None:
    """Returns the parameters of the quantizer if `conv` takes the fused path on `x`, else None.

    Uniform quantizers have operators on integers only. Compilers fuse them as they are.
    """
    quantizer = conv.activation_quantizer if quantizer is None else quantizer
    if not _suits(x) or (quantizer := _code_quantizer(conv, quantizer)) is None:
        return None
    if isinstance(quantizer, LearnableThresholdQuantizer):
        return quantizer.grid(x)
    if torch.compiler.is_compiling() or integer_backend(conv, x) == "reference":
        return None
    wide = all(p.dtype == torch.float32 for p in quantizer.parameters(recurse=False))
    return quantizer.grid(x) if wide and integer_weight_known(conv) else None


def _shifted_conv(conv: FusibleConv2d, x: Tensor) -> Tensor | None:
    """Returns `conv(x)` fused behind a quantizer `method(x - shift) + shift`, None where it is another.

    The shift of the quantized input adds the sums of the weights inside each window. What is kept for the
    backward pass is `x` itself, which the layer before keeps as well, instead of `x - shift`.
    """
    outer = conv.activation_quantizer
    if not isinstance(outer, Quantizer) or outer.method is outer or has_hooks(outer) or not _suits(x):
        return None
    device = x.device.type
    if not conv.training or torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
        return None
    shift = outer.shift(x)
    if shift is None or not x.dtype == shift.dtype == conv.weight.dtype:
        return None
    inside = x - shift
    if (grid := _grid(conv, inside, outer.method)) is None:
        return None
    with recomputed(inside, x, shift):
        out = _fused_conv(inside, None, None, grid, conv)
    sums = conv.weight_quantizer(conv.weight).sum(1, keepdim=True)
    ones = x.new_ones(1, 1, *x.shape[2:])
    return out + shift * F.conv2d(ones, sums, None, conv.stride, conv.padding, conv.dilation)


def _fused_conv(
    x: Tensor,
    norm: nn.BatchNorm2d | None,
    act: BiasedPReLU | None,
    grid: QuantizerParameters | UniformParameters,
    conv: FusibleConv2d,
) -> Tensor:
    """Returns `conv(act(norm(x)))`, fused; `grid` is that of the convolution's own quantizer."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    norm_given = None if norm is None else _norm_parameters(norm)
    act_given = None if act is None else _prelu_parameters(act)
    assert isinstance(conv.padding, tuple)  # `_code_quantizer` has made sure
    bias = None if conv.bias is None else conv.bias.to(dtype)
    geometry = Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)
    backend = select(ACTIVATION, x.device)
    integers = integer_backend(conv, x)
    leveled = None if integers == "reference" else _leveled_weight(conv)
    if leveled is not None:
        chain = norm_given, act_given, grid
        out, stats = quantized_conv2d(x, *chain, leveled, bias, geometry, dtype, (backend, integers))
    else:
        assert isinstance(grid, QuantizerParameters)  # `_grid` has made sure
        y, packed, stats = packed_activation(x, norm_given, act_given, grid, dtype, backend)
        source = PackedInput(y, packed, grid.scale_out, grid.widths.numel().bit_length(), backend)
        out = packed_conv2d(source, _quantized_weight(conv, dtype), bias, geometry)
    if norm is not None:
        _update_running_stats(norm, stats, x)
    return out


def _quantized_weight(conv: FusibleConv2d, dtype: torch.dtype) -> QuantizedWeight:
    quantizer = conv.weight_quantizer
    if not _entropy_preserving(quantizer):
        return QuantizedWeight(quantizer(conv.weight).to(dtype))
    quantized, scale = quantize_weight_with_scale(conv.weight.detach(), quantizer.bits, dtype=dtype)
    through = quantizer.gradient == "straight_through"
    return QuantizedWeight(quantized, conv.weight, scale, quantizer.bits, through)


def _leveled_weight(conv: FusibleConv2d) -> LeveledWeight | None:
    """Returns the weight as integers, None where its quantizer has none."""
    quantizer = conv.weight_quantizer
    if _entropy_preserving(quantizer):
        return LeveledWeight(conv.weight, quantizer.bits, quantizer.gradient == "straight_through")
    if not integer_weight_known(conv):
        return None
    quantized = quantizer(conv.weight)  # first: it may set the quantizer's parameters
    with torch.no_grad():
        found = quantizer.weight_grid(conv.weight)  # type: ignore[operator]
    return None if found is None else LeveledWeight(quantized, 0, False, *found)


def _entropy_preserving(quantizer: nn.Module) -> TypeGuard[EntropyPreservingWeightQuantizer]:
    """Returns whether the operators can quantize the weight themselves, as `quantizer` would."""
    return (
        type(quantizer) is EntropyPreservingWeightQuantizer and quantizer.rescale and not has_hooks(quantizer)
    )


def _norm_parameters(norm: nn.BatchNorm2d) -> NormParameters:
    return NormParameters(norm.weight, norm.bias, norm.eps)


def _prelu_parameters(act: BiasedPReLU) -> PReLUParameters:
    return PReLUParameters(act.bias_in, act.slopes(), act.bias_out)


@torch.no_grad()
def _update_running_stats(norm: nn.BatchNorm2d, stats: Tensor, x: Tensor) -> None:
    """Moves the running statistics towards the batch's, as the norm does in training.

    Args:
        norm: The norm.
        stats: `[2, C]`, mean and biased variance of `x`.
        x: `[N, C, H, W]`, the norm's input.
    """
    number = x.numel() // x.shape[1]
    mean, variance = stats.unbind(0)
    norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    for running, value in ((norm.running_mean, mean), (norm.running_var, variance * (number / (number - 1)))):
        running.lerp_(value.to(running.dtype), norm.momentum)  # type: ignore[union-attr, arg-type]
