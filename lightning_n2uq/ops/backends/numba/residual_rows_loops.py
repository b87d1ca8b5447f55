"""Compiled loops of a residual block's end on channels-last maps; maps and tables as in `row_loops`.

The backward pass runs over the maps twice, for the sums and for the gradients, and computes what the norms
put out both times: that is less work than writing it down and reading it.
"""

from __future__ import annotations

import numpy as np

from lightning_n2uq.ops.backends.common.jit import Array, compiled, helper
from lightning_n2uq.ops.backends.common.rows import Units
from lightning_n2uq.ops.backends.numba.row_loops import (
    activate,
    activation_gradient,
    add_products,
    fold,
    input_sums,
    loaded,
    norm_gradient,
    normalize,
    span,
    store,
    target,
    tiled,
)


@helper
def _branch_sum(
    x: Array, norm: Array, other: Array, other_norm: Array, place: int, u: Array, spare: Array
) -> None:
    """Writes to `u` the norm of `x` plus `other` (normed where `other_norm` has rows)."""
    normalize(x, norm, place, u)
    if other_norm.shape[0] == 0:
        for i in range(u.size):
            u[i] += other[i]
        return
    normalize(other, other_norm, place, spare)
    for i in range(u.size):
        u[i] += spare[i]


@compiled
def residual_forward_rows(
    first: int,
    last: int,
    form: Units,
    x: Array,
    norm: Array,
    other: Array,
    other_norm: Array,
    act: Array,
    y: Array,
) -> None:
    """Writes `prelu(norm(x) + other + bias) + bias` of the units `first .. last - 1`."""
    size = form.size
    xs, others, ys = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    u, spare = np.empty(size, np.float32), np.empty(size, np.float32)
    norms, second, acts = tiled(norm, form), tiled(other_norm, form), tiled(act, form)
    for index in range(first, last):
        begin, end, place = span(index, form, x.size)
        k = end - begin
        source, branch = loaded(x, begin, end, xs), loaded(other, begin, end, others)
        result = target(y, begin, end, ys)
        _branch_sum(source, norms, branch, second, place, u[:k], spare[:k])
        activate(u[:k], acts, place, result)
        store(result, y, begin)


@helper
def _inner_gradient(u: Array, act: Array, place: int, g: Array, d: Array) -> None:
    """Leaves in `u` what PReLU sees, and writes to `d` the gradient of the branches' sum."""
    bias_in, slope = act[0, place : place + u.size], act[1, place : place + u.size]
    for i in range(u.size):
        u[i] += bias_in[i]
    for i in range(u.size):
        d[i] = g[i] if u[i] > 0 else g[i] * slope[i]


@compiled
def residual_sums_rows(
    first: int,
    last: int,
    size: int,
    form: Units,
    grad: Array,
    x: Array,
    norm: Array,
    moments: Array,
    other: Array,
    other_norm: Array,
    other_moments: Array,
    act: Array,
    sums: Array,
) -> None:
    """Writes sums `[chunks, 5, C]`: four as of `fused_activation_loops`, the last of the other branch."""
    length = form.size
    xs, others, gs = np.empty(length, np.float32), np.empty(length, np.float32), np.empty(length, np.float32)
    u, d, acc = np.empty(length, np.float32), np.empty(length, np.float32), np.empty((5, form.period))
    norms, second, acts = tiled(norm, form), tiled(other_norm, form), tiled(act, form)
    means, other_means = tiled(moments, form)[0], tiled(other_moments, form)[0]
    for chunk in range(first, last):
        acc[:] = 0.0
        for index in range(chunk * size, (chunk + 1) * size):
            begin, end, place = span(index, form, x.size)
            k = end - begin
            if k <= 0:
                break
            g, source = loaded(grad, begin, end, gs), loaded(x, begin, end, xs)
            branch = loaded(other, begin, end, others)
            _branch_sum(source, norms, branch, second, place, u[:k], d[:k])
            bias_in = acts[0, place : place + k]
            for i in range(k):
                u[i] += bias_in[i]
                d[i] = g[i]
            activation_gradient(d[:k], u[:k], acts, place, form, acc)
            input_sums(d[:k], source, means, place, form, acc)
            if second.shape[0] > 0:
                add_products(d[:k], branch, other_means[place : place + k], form, acc[4, place : place + k])
        fold(acc, sums[chunk])


@compiled
def residual_backward_rows(
    first: int,
    last: int,
    form: Units,
    grad: Array,
    x: Array,
    norm: Array,
    moments: Array,
    fixes: Array,
    other: Array,
    other_norm: Array,
    other_moments: Array,
    other_fixes: Array,
    act: Array,
    dx: Array,
    dother: Array,
) -> None:
    """Writes the gradients of both branches of the units `first .. last - 1`."""
    size = form.size
    xs, others, gs = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    u, d, out = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    norms, second, acts = tiled(norm, form), tiled(other_norm, form), tiled(act, form)
    numbers, other_numbers = tiled(moments, form), tiled(other_moments, form)
    offsets, other_offsets = tiled(fixes, form), tiled(other_fixes, form)
    for index in range(first, last):
        begin, end, place = span(index, form, x.size)
        k = end - begin
        g, source = loaded(grad, begin, end, gs), loaded(x, begin, end, xs)
        branch = loaded(other, begin, end, others)
        _branch_sum(source, norms, branch, second, place, u[:k], d[:k])
        _inner_gradient(u[:k], acts, place, g, d[:k])
        result = target(dx, begin, end, out)
        result[:] = d[:k]
        norm_gradient(result, source, numbers, offsets, place)
        store(result, dx, begin)
        result = target(dother, begin, end, out)
        result[:] = d[:k]
        if second.shape[0] > 0:
            norm_gradient(result, branch, other_numbers, other_offsets, place)
        store(result, dother, begin)
