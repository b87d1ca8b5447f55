"""Chains of modules between two convolutions, fused in training where nothing else would happen.

The fused norm differs from torch's in the last bits: its statistics are summed in float64. Under autocast
maps between blocks keep the dtype of the convolutions.
"""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn

from lightning_n2uq.fusion import (
    hooked,
    norm_arguments,
    ordinary_norm,
    packable,
    packed_conv,
    suits,
    update_running_stats,
)
from lightning_n2uq.layers import BiasedPReLU, QuantConv2d
from lightning_n2uq.ops.formats.fused_activation import Activation
from lightning_n2uq.ops.residual import residual_activation
from lightning_n2uq.ops.stem import norm_relu_pool


def _ordinary_act(act: nn.Module) -> TypeGuard[BiasedPReLU]:
    return type(act) is BiasedPReLU and not hooked(act)


def norm_act_conv(x: Tensor, norm: nn.Module | None, act: nn.Module, conv: nn.Module) -> Tensor:
    """`conv(act(norm(x)))`: batch norm (or None), `BiasedPReLU`, `QuantConv2d`."""
    ordinary = _ordinary_act(act) and type(conv) is QuantConv2d and not hooked(conv)
    if not (ordinary and suits(x) and packable(conv)):
        return conv(act(x if norm is None else norm(x)))  # type: ignore[no-any-return]
    if norm is None:
        return packed_conv(x, None, act, conv)
    if ordinary_norm(norm):
        return packed_conv(x, norm, act, conv)
    return packed_conv(norm(x), None, act, conv)


def norm_add_act(
    x: Tensor, norm: nn.Module, shortcut: Tensor, other: nn.Module | None, act: nn.Module
) -> Tensor:
    """`act(norm(x) + other(shortcut))`: batch norms (the second may be None) and `BiasedPReLU`.

    Args:
        x: `[N, C, H, W]`.
        norm: of `x`.
        shortcut: shape of `x`.
        other: norm of the shortcut, or None.
        act: a `BiasedPReLU`.
    """
    suitable = (
        suits(x, "residual_block") and x.shape == shortcut.shape and (other is None or ordinary_norm(other))
    )
    if not (suitable and _ordinary_act(act) and ordinary_norm(norm)):
        return act(norm(x) + (shortcut if other is None else other(shortcut)))  # type: ignore[no-any-return]
    y, stats, other_stats = residual_activation(
        x,
        norm_arguments(norm),
        shortcut,
        norm_arguments(other) if ordinary_norm(other) else None,
        Activation(act.bias_in, act.slope, act.bias_out),
    )
    update_running_stats(norm, stats, x.numel() // x.shape[1])
    if ordinary_norm(other):
        update_running_stats(other, other_stats, x.numel() // x.shape[1])
    return y


def norm_act_pool(x: Tensor, norm: nn.Module, act: nn.Module, pool: nn.Module) -> Tensor:
    """`pool(act(norm(x)))`: batch norm, ReLU, max pooling (or whatever the modules are)."""
    if not (suits(x, "stem") and ordinary_norm(norm) and _ordinary_pool(act, pool)):
        return pool(act(norm(x)))  # type: ignore[no-any-return]
    window = pool.kernel_size, pool.stride, pool.padding
    y, stats = norm_relu_pool(x, norm_arguments(norm), window)  # type: ignore[arg-type]
    update_running_stats(norm, stats, x.numel() // x.shape[1])
    return y


def _ordinary_pool(act: nn.Module, pool: nn.Module) -> bool:
    return (
        type(act) is nn.ReLU
        and type(pool) is nn.MaxPool2d
        and isinstance(pool.kernel_size, int)
        and isinstance(pool.stride, int)
        and isinstance(pool.padding, int)
        and pool.kernel_size <= 15
        and pool.dilation == 1
        and not pool.ceil_mode
        and not pool.return_indices
        and not hooked(act, pool)
    )
