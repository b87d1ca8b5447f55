"""When a layer may take the fused training path, which keeps less for the backward pass, and that path.

The fused path is taken where the plain chain of modules would do nothing else: training mode, single or half
precision, N2UQ quantizers with hard thresholds, ordinary batch norms, no hooks on the modules that would be
skipped, and kernels for the device. Evaluation is always plain.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from lightning_n2uq.ops.dispatch import kernel_for
from lightning_n2uq.ops.formats.fused_activation import Activation
from lightning_n2uq.ops.fused_activation import packed_activation
from lightning_n2uq.ops.fused_conv import Geometry, PackedInput, QuantizedWeight, packed_conv2d
from lightning_n2uq.ops.weight import quantize_weight_with_scale
from lightning_n2uq.quantizers.n2uq import EntropyPreservingWeightQuantizer, LearnableThresholdQuantizer

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _most_bits(op: str, device_type: str) -> int:
    """Up to how many bits there are kernels; 0 without any."""
    return {"reference": 0, "numba": 8, "triton": 4}[kernel_for(op, torch.device(device_type))]


def hooked(*modules: nn.Module | None) -> bool:
    """Whether any hook would run if the modules were called."""
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return True
    if nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks:
        return True
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
        if m is not None
    )


def suits(x: Tensor, op: str = "packed_activation") -> bool:
    """Whether a fused operator takes `x`: `[N, C, H, W]`, not empty, single or half precision."""
    return (
        x.dim() == 4 and x.dtype in _DTYPES and x.numel() > x.shape[1] and _most_bits(op, x.device.type) > 0
    )


def ordinary_norm(norm: nn.Module | None) -> TypeGuard[nn.BatchNorm2d]:
    """Whether `norm` is torch's batch norm, in training, with everything at hand that the fused one needs."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and norm.weight.dtype in _DTYPES
        and not hooked(norm)
    )


def norm_arguments(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, float]:
    """`gamma, beta, eps`."""
    return norm.weight, norm.bias, norm.eps


@torch.no_grad()
def update_running_stats(norm: nn.BatchNorm2d, stats: Tensor, number: int) -> None:
    """What the norm does in training: moves its running statistics towards the batch's.

    Args:
        norm: the norm.
        stats: `[2, C]`, mean and biased variance.
        number: values per channel.
    """
    mean, variance = stats.unbind(0)
    norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    for running, value in ((norm.running_mean, mean), (norm.running_var, variance * (number / (number - 1)))):
        running.lerp_(value.to(running.dtype), norm.momentum)  # type: ignore[union-attr, arg-type]


def packable(conv: nn.Module) -> bool:
    """Whether the convolution's input can be kept as codes, and the convolution itself is an ordinary one."""
    quantizer = conv.activation_quantizer
    return (
        conv.training
        and isinstance(quantizer, LearnableThresholdQuantizer)
        and type(quantizer).forward is LearnableThresholdQuantizer.forward
        and quantizer.training
        and quantizer.ramp == 0
        and quantizer.comparison == ">"
        and quantizer.widths.dtype in _DTYPES
        and quantizer.bits <= _most_bits("packed_activation", quantizer.widths.device.type)
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
        and conv.weight.dtype in _DTYPES
        and not hooked(quantizer)
    )


def packed_conv(x: Tensor, norm: nn.BatchNorm2d | None, act: Any, conv: Any) -> Tensor:  # noqa: ANN401
    """`conv(act(norm(x)))`, fused; the callers have asked `suits`, `ordinary_norm` and `packable`.

    Args:
        x: `[N, C_in, H, W]`.
        norm: in front, or None.
        act: a `BiasedPReLU`, or None.
        conv: a `QuantConv2d`.
    """
    quantizer = conv.activation_quantizer
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    y, packed, stats = packed_activation(
        x,
        None if norm is None else (norm.weight, norm.bias),
        0.0 if norm is None else norm.eps,
        None if act is None else Activation(act.bias_in, act.slope, act.bias_out),
        (quantizer.start, quantizer.widths, quantizer.scale_in, quantizer.scale_out),
        dtype,
    )
    if norm is not None:
        update_running_stats(norm, stats, x.numel() // x.shape[1])
    bias = None if conv.bias is None else conv.bias.to(dtype)
    source = PackedInput(y, packed, quantizer.scale_out, quantizer.bits)
    geometry = Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)
    return packed_conv2d(source, _quantized_weight(conv, dtype), bias, geometry)


def _quantized_weight(conv: Any, dtype: torch.dtype) -> QuantizedWeight:  # noqa: ANN401
    quantizer = conv.weight_quantizer
    if type(quantizer) is not EntropyPreservingWeightQuantizer or not quantizer.rescale or hooked(quantizer):
        return QuantizedWeight(quantizer(conv.weight).to(dtype))
    quantized, scale = quantize_weight_with_scale(conv.weight.detach(), quantizer.bits)
    through = quantizer.gradient == "straight_through"
    return QuantizedWeight(quantized.to(dtype), conv.weight, scale, quantizer.bits, through)
