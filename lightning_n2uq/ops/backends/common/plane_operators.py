"""The fused operators on planes or rows: a backend adds its kernels as the fields of these classes.

The kernels take and return planes, `[N, C, P]` float32, or rows, `[R, C]` float32 or bfloat16 (the stem's
whole maps, contiguous float32 or channels-last).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_n2uq.ops.backends.common.planes import (
    channel_gradients,
    kernel_map,
    known_norm,
    map_of,
    measured_norm,
    output_table,
)
from lightning_n2uq.ops.backends.common.rows import DTYPES as ROW_DTYPES
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
    unpack: Callable[[Tensor, Tensor, Sequence[int], torch.dtype], Tensor]

    def forward(
        self,
        x: Tensor,
        norm: NormParameters | None,
        act: PReLUParameters | None,
        quantizer: QuantizerParameters,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the quantized chain in `dtype` (uint8: its codes), packed codes, the batch's statistics."""
        source = kernel_map(x, x)
        stats, known = measured_norm(source, norm, self.statistics)
        computed = _computed(dtype, rows=source.dim() == 2)
        y, packed = self.quantize(source, known, act, operator_tables(quantizer, torch.float32), computed)
        return map_of(y, x.shape).to(dtype), packed, stats

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
        maps = kernel_map(grad, x), kernel_map(x, x)
        dx, sums, segments = self.gradient(*maps, known, act, tables, quantizer.scale_out)
        return ActivationGradients(
            map_of(dx, x.shape).to(x.dtype),
            *channel_gradients(sums, known, norm, act),
            *parameter_gradients(*segments, quantizer),
        )

    def rebuild(
        self, packed: Tensor, scale_out: Tensor, bits: int, size: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Returns the quantized map `[N, C, H, W]` from its packed codes: the bits of the forward pass."""
        computed = _computed(dtype, rows=packed.dim() == 2)
        y = self.unpack(packed, output_table(scale_out, bits), size, computed)
        return map_of(y, size).to(dtype)


def _computed(dtype: torch.dtype, *, rows: bool) -> torch.dtype:
    """Returns in which dtype kernels write a map that is wanted in `dtype`."""
    return dtype if dtype == torch.uint8 or (rows and dtype in ROW_DTYPES) else torch.float32


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
        source, second = kernel_map(x, x), kernel_map(other, x)
        stats, first = measured_norm(source, norm, self.statistics)
        other_stats, other_first = measured_norm(second, other_norm, self.statistics)
        y = self.value(source, first, second, other_first, act)
        return map_of(y, x.shape).to(x.dtype), stats, other_stats

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
        upstream, source, branch = kernel_map(grad, x), kernel_map(x, x), kernel_map(other, x)
        dx, dother, sums, other_sums = self.gradient(upstream, source, first, branch, second, act)
        return ResidualGradients(
            map_of(dx, x.shape).to(x.dtype),
            map_of(dother, x.shape).to(other.dtype),
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
        source = map_of(kernel_map(x, x), x.shape)
        stats, known = measured_norm(kernel_map(source, source), norm, self.statistics)
        y, taps = self.value(source, known, window.pooled(x.shape[2:]), window)
        return y.to(x.dtype), taps, stats

    def backward(
        self, grad: Tensor, taps: Tensor, x: Tensor, stats: Tensor, norm: NormParameters, window: Window
    ) -> PoolGradients:
        """Returns all gradients."""
        known = known_norm(stats, norm)
        source, upstream = map_of(kernel_map(x, x), x.shape), map_of(kernel_map(grad, x), grad.shape)
        dx, sums = self.gradient(upstream, taps, source, known, window)
        gamma, beta, *_ = channel_gradients(sums, known, norm, None)
        return PoolGradients(dx.to(x.dtype), gamma, beta)  # type: ignore[arg-type]
