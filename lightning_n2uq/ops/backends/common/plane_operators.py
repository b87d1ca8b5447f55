"""The fused operators on planes: what a backend adds is its kernels, as the fields of these classes.

The kernels take and return planes, `[N, C, P]` float32 (the stem's `[N, C, H, W]`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_n2uq.ops.backends.common.planes import (
    channel_gradients,
    known_norm,
    measured_norm,
    output_table,
    planes,
)
from lightning_n2uq.ops.formats.fused_activation import (
    ActivationGradients,
    NormParameters,
    PoolGradients,
    PReLUParameters,
    ResidualGradients,
    Window,
)
from lightning_n2uq.ops.tables import QuantizerParameters, operator_tables, parameter_gradients

Statistics = Callable[[Tensor], tuple[Tensor, Tensor]]


class PlaneActivation(NamedTuple):
    """The fused chain; see `reference.fused_activation` for what the kernels compute."""

    statistics: Statistics
    quantize: Callable[..., tuple[Tensor, Tensor]]
    gradient: Callable[..., tuple[Tensor, Tensor, tuple[Tensor, Tensor]]]
    unpack: Callable[[Tensor, Tensor, int], Tensor]

    def forward(
        self,
        x: Tensor,
        norm: NormParameters | None,
        act: PReLUParameters | None,
        quantizer: QuantizerParameters,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the quantized chain in `dtype` (uint8: its codes), packed codes, the batch's statistics."""
        source = planes(x)
        stats, known = measured_norm(source, norm, self.statistics)
        computed = torch.uint8 if dtype == torch.uint8 else torch.float32
        y, packed = self.quantize(source, known, act, operator_tables(quantizer, torch.float32), computed)
        return y.reshape(x.shape).to(dtype), packed, stats

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        packed: Tensor | None,
        stats: Tensor,
        norm: NormParameters | None,
        act: PReLUParameters | None,
        quantizer: QuantizerParameters,
    ) -> ActivationGradients:
        """Returns all gradients; `packed` is None."""
        known = None if norm is None else known_norm(stats, norm)
        tables = operator_tables(quantizer, torch.float32)
        dx, sums, segments = self.gradient(planes(grad), planes(x), known, act, tables, quantizer.scale_out)
        return ActivationGradients(
            dx.reshape(x.shape).to(x.dtype),
            *channel_gradients(sums, known, norm, act),
            *parameter_gradients(*segments, quantizer),
        )

    def rebuild(
        self, packed: Tensor, scale_out: Tensor, bits: int, size: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Returns the quantized map `[N, C, H, W]` from its packed codes: the bits of the forward pass."""
        y = self.unpack(packed, output_table(scale_out, bits), size[2] * size[3])
        return y.reshape(size).to(dtype)


class PlaneResidual(NamedTuple):
    """The end of a residual block; see `reference.residual` for what the kernels compute."""

    statistics: Statistics
    value: Callable[..., Tensor]
    gradient: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]

    def forward(
        self,
        x: Tensor,
        norm: NormParameters,
        other: Tensor,
        other_norm: NormParameters | None,
        act: PReLUParameters,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the block's output, and the batch's statistics of both branches."""
        source, second = planes(x), planes(other)
        stats, first = measured_norm(source, norm, self.statistics)
        other_stats, other_first = measured_norm(second, other_norm, self.statistics)
        y = self.value(source, first, second, other_first, act)
        return y.reshape(x.shape).to(x.dtype), stats, other_stats

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        stats: Tensor,
        norm: NormParameters,
        other: Tensor,
        other_stats: Tensor,
        other_norm: NormParameters | None,
        act: PReLUParameters,
    ) -> ResidualGradients:
        """Returns all gradients."""
        first = known_norm(stats, norm)
        second = None if other_norm is None else known_norm(other_stats, other_norm)
        dx, dother, sums, other_sums = self.gradient(
            planes(grad), planes(x), first, planes(other), second, act
        )
        return ResidualGradients(
            dx.reshape(x.shape).to(x.dtype),
            dother.reshape(x.shape).to(other.dtype),
            *channel_gradients(sums, first, norm, act),  # type: ignore[arg-type]
            *channel_gradients(other_sums, second, other_norm, None)[:2],
        )


class PlanePool(NamedTuple):
    """The stem; see `reference.stem` for what the kernels compute."""

    statistics: Statistics
    value: Callable[..., tuple[Tensor, Tensor]]
    gradient: Callable[..., tuple[Tensor, Tensor]]

    def forward(self, x: Tensor, norm: NormParameters, window: Window) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the pooled map, the position of each maximum in its window, and the batch's statistics."""
        source = x.detach().float().contiguous()
        stats, known = measured_norm(source.flatten(2), norm, self.statistics)
        y, taps = self.value(source, known, window.pooled(x.shape[2:]), window)
        return y.to(x.dtype), taps, stats

    def backward(
        self, grad: Tensor, taps: Tensor, x: Tensor, stats: Tensor, norm: NormParameters, window: Window
    ) -> PoolGradients:
        """Returns all gradients."""
        known = known_norm(stats, norm)
        source, upstream = x.detach().float().contiguous(), grad.detach().float().contiguous()
        dx, sums = self.gradient(upstream, taps, source, known, window)
        gamma, beta, *_ = channel_gradients(sums, known, norm, None)
        return PoolGradients(dx.to(x.dtype), gamma, beta)  # type: ignore[arg-type]
