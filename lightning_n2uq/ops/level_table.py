"""Tables that are learned entry by entry: reading them, and rounding to the nearest of learned levels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _ReadTable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(index)
        ctx.size = len(table)
        return entries(table, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (index,) = ctx.saved_tensors
        return sums_by_index(grad, index, ctx.size), None


class _NearestLevel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: Tensor) -> Tensor:  # noqa: ANN401
        lower, share = level_place(x, levels)
        ctx.save_for_backward(x, levels, lower.to(torch.uint8))  # a byte: there are 256 levels at most
        value = entries(levels, lower + (share > 0.5))
        return torch.where(share.isnan(), share, value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        x, levels, lower = ctx.saved_tensors
        lower, share = lower.long(), _share(x, levels, lower.int())
        below, above = x < levels[0], x > levels[-1]
        # Beyond the ends the rounded and the exact share are equal, so that nothing reaches a segment.
        upwards = sums_by_index(grad * ((share > 0.5).to(grad.dtype) - share), lower, len(levels) - 1)
        grads = torch.cat([-upwards, upwards.new_zeros(1)]) + torch.cat([upwards.new_zeros(1), upwards])
        grads[0] += torch.where(below, grad, 0).sum()
        grads[-1] += torch.where(above, grad, 0).sum()
        return torch.where(below | above | x.isnan(), 0 * grad, grad), grads.to(levels.dtype)


def read_table(table: Tensor, index: Tensor) -> Tensor:
    """Returns `table[index]`; the gradient of an entry is the sum over its readers.

    Args:
        table: The entries `[T]`.
        index: The entries to read, int64, of any shape.
    """
    y: Tensor = _ReadTable.apply(table, index)
    return y


def sums_by_index(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Returns the sums of the values that share an index, `[count]`, in the dtype of the values.

    The sums are the same in every run, also on an accelerator, where each index costs a pass of its own.
    """
    if values.is_cpu and not torch.compiler.is_compiling():
        return torch.bincount(index.reshape(-1), values.reshape(-1).double(), count).to(values.dtype)
    return torch.stack([torch.where(index == i, values, 0).sum() for i in range(count)])


def nearest_of_learned(x: Tensor, levels: Tensor) -> Tensor:
    """Returns the nearest of increasing `levels`; a tie goes to the lower one, NaN stays NaN.

    Between two levels `l < u` the value is `l + (u - l) r` with `r` the rounding of `p = (x - l) / (u - l)`,
    and the gradient is straight through the rounding: of `x`, 1 from the first to the last level and 0
    outside; of `u`, `r - p`, of `l`, `p - r`; of an outermost level, 1 from every `x` beyond it.

    Args:
        x: Values of any shape.
        levels: Two to 256 levels `[L]` in the dtype of `x`.
    """
    y: Tensor = _NearestLevel.apply(x, levels)
    return y


def level_place(x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the index, int64, of the lower of the two levels around each value, and the share between them.

    Index and share add up to a position whose nearest integer is the index of the nearest level; beyond the
    ends the share is 0 or 1.
    """
    lower = torch.bucketize(x.detach().contiguous(), levels.detach()[1:-1])
    return lower, _share(x, levels, lower)


def _share(x: Tensor, levels: Tensor, lower: Tensor) -> Tensor:
    return ((x - entries(levels, lower)) / entries(levels.diff(), lower)).clamp(0, 1)


def entries(table: Tensor, index: Tensor) -> Tensor:
    """Returns `table[index]` `[T]`, a few times faster on a CPU."""
    return table.index_select(0, index.reshape(-1)).reshape(index.shape)
