"""CPU kernels (numba) of a residual block's end on channels-last maps, `[R, C]` (`residual_rows_loops`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_n2uq.ops.backends.common.jit import run_chunks
from lightning_n2uq.ops.backends.common.planes import PlaneNorm
from lightning_n2uq.ops.backends.common.rows import units
from lightning_n2uq.ops.backends.numba.channel_tables import act_table, moments_table, norm_table
from lightning_n2uq.ops.backends.numba.fused_activation_rows import corrections, flat, smallest
from lightning_n2uq.ops.backends.numba.residual_rows_loops import (
    residual_backward_rows,
    residual_forward_rows,
    residual_sums_rows,
)
from lightning_n2uq.ops.formats.fused_activation import PReLUParameters


def value(
    x: Tensor, norm: PlaneNorm, other: Tensor, other_norm: PlaneNorm | None, act: PReLUParameters
) -> Tensor:
    """Returns `prelu(norm(x) + other_norm(other) + bias) + bias` in the dtype of `x`."""
    y, channels, form = torch.empty_like(x), x.shape[1], units(x.shape[1])
    branches = flat(x), norm_table(norm, channels), flat(other), norm_table(other_norm, channels)
    number = form.number(x.numel())
    run_chunks(
        residual_forward_rows, number, smallest(form), form, *branches, act_table(act, channels), flat(y)
    )
    return y


def gradient(
    grad: Tensor,
    x: Tensor,
    norm: PlaneNorm,
    other: Tensor,
    other_norm: PlaneNorm | None,
    act: PReLUParameters,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns both inputs' gradients, and for each the sums of `fused_activation.gradient`."""
    channels, form = x.shape[1], units(x.shape[1])
    chunks, size = form.chunks(x.numel())
    partial = np.empty((chunks, 5, channels))
    first = flat(x), norm_table(norm, channels), moments_table(norm, channels)
    second = flat(other), norm_table(other_norm, channels), moments_table(other_norm, channels)
    acts = act_table(act, channels)
    run_chunks(residual_sums_rows, chunks, 1, size, form, flat(grad), *first, *second, acts, partial)
    total = partial.sum(0)
    sums, other_sums = total[:4], np.zeros((4, channels))
    other_sums[0], other_sums[3] = total[0], total[4]
    fixes = corrections(sums, norm, x.shape[0])
    other_fixes = fixes if other_norm is None else corrections(other_sums, other_norm, x.shape[0])
    dx, dother = torch.empty_like(x), torch.empty_like(other)
    arrays = flat(grad), *first, fixes, *second, other_fixes, acts, flat(dx), flat(dother)
    run_chunks(residual_backward_rows, form.number(x.numel()), smallest(form), form, *arrays)
    return dx, dother, torch.from_numpy(sums.T), torch.from_numpy(other_sums.T)
