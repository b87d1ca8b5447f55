# Compiled functions take no annotations: Triton infers the types of their arguments.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
"""Triton kernels of the activation quantizer: one pass forward, one backward, same bits as the reference.

The scaled input is a product of its own: a multiply-add would round once where the reference rounds twice.
The backward pass gives every program a fixed run of tiles and accumulates, per thread, the sums of
`tables` for up to sixteen widths at a time (a pass more per sixteen widths beyond 4 bits); programs
leave float64 partial sums, added in fixed order. Under `TRITON_INTERPRET=1` the kernels run on CPU tensors,
which is how they are tested without a GPU. Nothing waits for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_n2uq.ops.backends.triton.positions import (
    CLIMBS,
    GROUP,
    LANES,
    LAUNCH,
    MOST_HELD,
    MULTIPROCESSORS,
    UNSPECIALIZED,
    add_group,
    add_products,
    add_values,
    climbed,
    count_below,
    count_below_fifteen,
    flat_to_zero,
    held_bounds,
    index_of,
    join4,
    load_bounds,
    load_pivots,
    load_shares,
    split4,
    store_climbs,
    total,
)
from lightning_n2uq.ops.backends.triton.product import product
from lightning_n2uq.ops.backends.triton.tables import (
    BY_SEGMENT,
    INVERSES,
    KNOT_RESTS,
    KNOTS,
    OUTPUTS,
    RAMP_SLOPES,
    RAMP_STARTS,
    THRESHOLDS,
    empty_sums,
    parameter_gradients,
    record,
    table_rows,
)
from lightning_n2uq.ops.layout import flat, flat_like
from lightning_n2uq.ops.tables import OUTPUT_RANGE, QuantizerParameters, compute_dtype

_RANGE = tl.constexpr(OUTPUT_RANGE)
_TILE = LANES * GROUP
_RESIDENT = {2: 8, 4: 8, 8: 6, 16: 4}  # programs whose registers fit a multiprocessor, by widths held


@triton.jit
def _ramp(s, tables_ptr, n):
    """Returns `reference.ramp_staircase`: finished ramps are counted, the open one is added."""
    begins_ptr, slopes_ptr = tables_ptr + RAMP_STARTS * (n + 2), tables_ptr + RAMP_SLOPES * (n + 2)
    finished, rising = tl.zeros_like(s), tl.zeros_like(s)
    for k in range(n):
        ramp = (s - tl.load(begins_ptr + k)) * tl.load(slopes_ptr + k)
        finished += tl.where(ramp >= 1, 1.0, 0.0).to(s.dtype)
        rising = tl.where((ramp > 0) & (ramp < 1), ramp, rising)
    step = (tl.full([], _RANGE, tl.float64) / n).to(s.dtype)
    return tl.where(s != s, s, (finished + rising) * step)


@triton.jit
def _count(
    s, held, low, middle, high, bounds_ptr, count,
    HELD: tl.constexpr, CHUNKS: tl.constexpr, FIFTEEN: tl.constexpr,
):  # fmt: skip
    """Returns how many bounds are below each `s` `[LANES, 4]`, int32: of the first fifteen, or of `count`."""
    a, b, c, d = split4(s)
    if FIFTEEN:
        index = join4(
            count_below_fifteen(a, low, middle, high, bounds_ptr),
            count_below_fifteen(b, low, middle, high, bounds_ptr),
            count_below_fifteen(c, low, middle, high, bounds_ptr),
            count_below_fifteen(d, low, middle, high, bounds_ptr),
        )
    else:
        number = join4(
            count_below(a, held, bounds_ptr, count, HELD, CHUNKS),
            count_below(b, held, bounds_ptr, count, HELD, CHUNKS),
            count_below(c, held, bounds_ptr, count, HELD, CHUNKS),
            count_below(d, held, bounds_ptr, count, HELD, CHUNKS),
        )
        index = index_of(number)
    return index


@triton.jit
def _load_centres(tables_ptr, first, n, HELD: tl.constexpr, LANES: tl.constexpr):
    """Returns inverse, knot below and its rounding error of `HELD` widths; behind the last, zeros."""
    k = first + tl.arange(0, HELD)
    known = k < n
    shape: tl.constexpr = [HELD, LANES]
    inverse = tl.load(tables_ptr + INVERSES * (n + 2) + k, mask=known, other=0.0)
    knot = tl.load(tables_ptr + KNOTS * (n + 2) + k, mask=known, other=0.0)
    rest = tl.load(tables_ptr + KNOT_RESTS * (n + 2) + k, mask=known, other=0.0)
    return (
        tl.broadcast_to(inverse[:, None], shape),
        tl.broadcast_to(knot[:, None], shape),
        tl.broadcast_to(rest[:, None], shape),
    )


@triton.jit
def _add_centred(climbs, pull, s, error, inverse, knot, rest):
    """Does `add_climbs` for narrow segments: an input's share is that of its distance to the knot."""
    distance = (tl.broadcast_to(s[None, :], climbs.shape) - knot) + (error[None, :] - rest)
    share = climbed(distance, inverse, tl.zeros_like(distance))
    return tl.fma(share, tl.broadcast_to(pull[None, :], climbs.shape), climbs)


@triton.jit
def _add_group_centred(climbs, pull, s, error, inverse, knot, rest):
    """Does `_add_centred` of `[LANES, 4]`, column by column; `error` is what `s` lost in rounding."""
    a0, a1, a2, a3 = split4(pull)
    s0, s1, s2, s3 = split4(s)
    e0, e1, e2, e3 = split4(error)
    climbs = _add_centred(climbs, a0, s0, e0, inverse, knot, rest)
    climbs = _add_centred(climbs, a1, s1, e1, inverse, knot, rest)
    climbs = _add_centred(climbs, a2, s2, e2, inverse, knot, rest)
    return _add_centred(climbs, a3, s3, e3, inverse, knot, rest)


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, tables_ptr, numel, n,
    RAMPED: tl.constexpr, HELD: tl.constexpr, CHUNKS: tl.constexpr, FIFTEEN: tl.constexpr,
    LANES: tl.constexpr,
) -> None:  # fmt: skip
    """Runs one tile of the forward pass; tables are in the compute dtype."""
    alpha = tl.load(tables_ptr)
    begin = tl.program_id(0).to(tl.int64) * (LANES * 4)
    place = tl.arange(0, LANES)[:, None] * 4 + tl.arange(0, 4)[None, :]
    inside = place < numel - begin
    x = tl.load(x_ptr + begin + place, mask=inside, other=0.0).to(alpha.dtype)
    s = product(x, tl.zeros_like(x) + alpha)
    if RAMPED:
        y = _ramp(s, tables_ptr, n) * tl.load(tables_ptr + 1)
    else:
        bounds_ptr, outputs_ptr = tables_ptr + THRESHOLDS * (n + 2), tables_ptr + OUTPUTS * (n + 2)
        held = load_bounds(bounds_ptr, 0, n, HELD)
        low, middle, high = load_pivots(bounds_ptr)
        code = _count(s, held, low, middle, high, bounds_ptr, n, HELD, CHUNKS, FIFTEEN)
        y = tl.where(s != s, s, tl.load(outputs_ptr + code))
    tl.store(y_ptr + begin + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_kernel(
    grad_ptr, x_ptr, dx_ptr, sums_ptr, tables_ptr, numel, n, tiles, first,
    RAMPED: tl.constexpr, WRITES: tl.constexpr, HELD: tl.constexpr, CHUNKS: tl.constexpr,
    FIFTEEN: tl.constexpr, CENTRED: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """Runs `tiles` tiles: sums over the widths from `first` on, and with `WRITES` all the rest.

    What lies behind the end has no gradient, and so adds nothing. `CENTRED` takes shares of narrow segments
    from distances: an inverse width times an input, less as large a number, would lose digits.
    """
    program = tl.program_id(0).to(tl.int64)
    alpha = tl.load(tables_ptr)
    gain = alpha * tl.load(tables_ptr + 1)
    knots_ptr = tables_ptr + KNOTS * (n + 2)
    held, sixteenth = load_bounds(knots_ptr, 0, n + 1, HELD), tl.load(knots_ptr + 15)
    low, middle, high = load_pivots(knots_ptr)
    if CENTRED:
        inverse, knot, rest = _load_centres(tables_ptr, first, n, HELD, LANES)
    else:
        inverse, offset = load_shares(tables_ptr, first, n, HELD, LANES)
    climbs = tl.zeros([HELD, LANES], alpha.dtype)
    zero = tl.zeros([LANES], alpha.dtype)
    value_sum, pull_sum, moment = zero, zero, zero
    place = tl.arange(0, LANES)[:, None] * 4 + tl.arange(0, 4)[None, :]
    for tile in range(tiles):
        begin = (program * tiles + tile) * (LANES * 4)
        inside = place < numel - begin
        x = tl.load(x_ptr + begin + place, mask=inside, other=0.0).to(alpha.dtype)
        g = tl.load(grad_ptr + begin + place, mask=inside, other=0.0).to(alpha.dtype)
        s = product(x, tl.zeros_like(x) + alpha)
        segment = _count(s, held, low, middle, high, knots_ptr, n + 1, HELD, CHUNKS, FIFTEEN)
        if FIFTEEN:
            segment += (s > sixteenth).to(tl.int32)
        threshold, slope, under, over = record(tables_ptr + BY_SEGMENT * (n + 2), segment)
        g = tl.where(s != s, s, g)  # a NaN input reaches every sum
        pull = g * slope
        if CENTRED:
            error = tl.fma(x, tl.zeros_like(x) + alpha, -s)
            error = tl.where(error == error, error, 0.0).to(s.dtype)  # of infinite inputs
            climbs = _add_group_centred(climbs, pull, s, error, inverse, knot, rest)
        else:
            climbs = add_group(climbs, pull, s, inverse, offset)
        if WRITES:
            tl.store(dx_ptr + begin + place, (g * (slope * gain)).to(dx_ptr.dtype.element_ty), mask=inside)
            value = _ramp(s, tables_ptr, n) if RAMPED else tl.where(s > threshold, over, under)
            value_sum = add_products(value_sum, g, value)
            pull_sum = add_values(pull_sum, pull)
            moment = add_products(moment, pull, flat_to_zero(pull, x))
    sums = sums_ptr + program * (CLIMBS + n)
    store_climbs(sums, climbs, first, n, HELD)
    if WRITES:
        tl.store(sums, total(value_sum))
        tl.store(sums + 1, total(pull_sum))
        tl.store(sums + 2, total(moment))


def forward(x: Tensor, quantizer: QuantizerParameters, ramp: float) -> Tensor:
    """Returns the quantized `x`; see `reference.threshold.forward`."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    n, tables = quantizer.widths.numel(), table_rows(*quantizer, compute_dtype(x.dtype), ramp)
    held = held_bounds(n)
    _forward_kernel[(triton.cdiv(x.numel(), _TILE),)](
        flat_like(x, y), flat(y), tables, x.numel(), n,
        RAMPED=ramp > 0, HELD=held, CHUNKS=triton.cdiv(n, held), FIFTEEN=n == 15, **LAUNCH,
    )  # fmt: skip
    return y


def backward(
    grad: Tensor, x: Tensor, quantizer: QuantizerParameters, ramp: float
) -> tuple[Tensor, QuantizerParameters]:
    """Returns the gradients of `x` and of the parameters; see `reference.threshold.backward`."""
    dx, n = torch.empty_like(x), quantizer.widths.numel()
    held = held_bounds(n)
    wanted = _RESIDENT[held] * MULTIPROCESSORS
    tiles = max(1, triton.cdiv(x.numel(), _TILE * wanted))
    programs = triton.cdiv(x.numel(), _TILE * tiles)
    sums = empty_sums(programs, n, x.device)
    if programs > 0:
        maps = flat_like(grad, dx), flat_like(x, dx), flat(dx)
        tables = table_rows(*quantizer, compute_dtype(x.dtype), ramp)
        for first in range(0, n, held):
            _backward_kernel[(programs,)](
                *maps, sums, tables, x.numel(), n, tiles, first, RAMPED=ramp > 0, WRITES=first == 0,
                HELD=held, CHUNKS=triton.cdiv(n + 1, held), FIFTEEN=n == 15, CENTRED=n > MOST_HELD,
                **LAUNCH,
            )  # fmt: skip
    return dx, parameter_gradients(sums, quantizer)
