"""Compiled loops of a residual block's end: what stands between two convolutions there.

Tensors and tables as in `fused_activation_loops`; work is split by channels.
"""

from __future__ import annotations

import numpy as np

from lightning_n2uq.ops.backends.common.jit import Array, Number, compiled, helper, summing
from lightning_n2uq.ops.backends.numba.code_loops import gather, per_block, scatter
from lightning_n2uq.ops.backends.numba.fused_activation_loops import (
    activate,
    activation_gradient,
    norm_gradient,
    normalize,
)
from lightning_n2uq.ops.backends.numba.threshold_loops import BLOCK


@helper
def _branch_sum(x: Array, norm: Array, other: Array, other_norm: Array, u: Array, spare: Array) -> None:
    """Writes to `u` the norm of `x` plus `other` (normed where `other_norm` has columns)."""
    normalize(x, norm, u)
    normalize(other, other_norm, spare)
    for i in range(u.size):
        u[i] += spare[i]


@compiled
def residual_forward(
    first: int, last: int, x: Array, norm: Array, other: Array, other_norm: Array, act: Array, y: Array
) -> None:
    """Writes `prelu(norm(x) + other + bias) + bias` of the channels `first .. last - 1`."""
    batch, pixels = x.shape[0], x.shape[2]
    together = min(per_block(pixels, BLOCK), batch)
    u, spare = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
    xs, others, ys = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
    for c in range(first, last):
        for n in range(0, batch, together):
            if together == 1:
                for begin in range(0, pixels, BLOCK):
                    end = min(begin + BLOCK, pixels)
                    part, rest = u[: end - begin], spare[: end - begin]
                    _branch_sum(
                        x[n, c, begin:end], norm[c], other[n, c, begin:end], other_norm[c], part, rest
                    )
                    activate(part, act[c], y[n, c, begin:end])
                continue
            planes = min(together, batch - n)
            size = planes * pixels
            gather(x, c, n, planes, xs)
            gather(other, c, n, planes, others)
            _branch_sum(xs[:size], norm[c], others[:size], other_norm[c], u[:size], spare[:size])
            activate(u[:size], act[c], ys[:size])
            scatter(ys, c, n, planes, y)


@summing
def _centred_product(d: Array, x: Array, mean: float) -> float:
    """Returns `sum d (x - mean)`."""
    total = 0.0
    for i in range(d.size):
        total += np.float64(d[i]) * (np.float64(x[i]) - mean)
    return total


@helper
def _residual_gradient(
    g: Array,
    x: Array,
    norm: Array,
    mean: Number,
    other: Array,
    other_norm: Array,
    other_mean: Number,
    act: Array,
    u: Array,
    spare: Array,
    d: Array,
    sums: Array,
    other_sums: Array,
) -> None:
    """Writes the gradient `d` of the branches' sum for one block of one channel; adds to the sums."""
    _branch_sum(x, norm, other, other_norm, u, spare)
    activate(u, act, spare)
    for i in range(d.size):
        d[i] = g[i]
    activation_gradient(d, u, x, act, mean, sums)
    if other_norm.size > 0:
        other_sums[3] += _centred_product(d, other, np.float64(other_mean))


@compiled
def residual_backward(
    first: int,
    last: int,
    grad: Array,
    x: Array,
    norm: Array,
    moments: Array,
    other: Array,
    other_norm: Array,
    other_moments: Array,
    act: Array,
    dx: Array,
    dother: Array,
    sums: Array,
    other_sums: Array,
) -> None:
    """Writes the gradients of both branches, and sums `[C, 4]` as in `fused_activation_loops` for each."""
    batch, pixels = x.shape[0], x.shape[2]
    together = min(per_block(pixels, BLOCK), batch)
    u, spare = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
    xs, others = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
    gs, ds = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
    for c in range(first, last):
        mean, other_mean = moments[c, 0], other_moments[c, 0]
        for n in range(0, batch, together):
            planes = min(together, batch - n)
            for begin in range(0, pixels, BLOCK):  # one round where planes are worked on together
                k = min(BLOCK, pixels - begin) * planes
                if together == 1:
                    end = begin + k
                    g, source, second = grad[n, c, begin:end], x[n, c, begin:end], other[n, c, begin:end]
                else:
                    gather(grad, c, n, planes, gs)
                    gather(x, c, n, planes, xs)
                    gather(other, c, n, planes, others)
                    g, source, second = gs[:k], xs[:k], others[:k]
                _residual_gradient(
                    g,
                    source,
                    norm[c],
                    mean,
                    second,
                    other_norm[c],
                    other_mean,
                    act[c],
                    u[:k],
                    spare[:k],
                    ds[:k],
                    sums[c],
                    other_sums[c],
                )
                if together == 1:
                    d, dsecond = dx[n, c, begin : begin + k], dother[n, c, begin : begin + k]
                    for i in range(k):
                        d[i] = ds[i]
                        dsecond[i] = ds[i]
                else:
                    scatter(ds, c, n, planes, dx)
                    scatter(ds, c, n, planes, dother)
        other_sums[c, 0] = sums[c, 0]
        norm_gradient(dx, x, moments[c], x.shape[0] * pixels, sums[c], c)
        if other_norm.shape[1] > 0:
            norm_gradient(dother, other, other_moments[c], x.shape[0] * pixels, other_sums[c], c)
