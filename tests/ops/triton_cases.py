"""The Triton kernels of the quantizers against the reference, on CPU tensors: interpreted, or emulated."""

import torch
from torch import Tensor

from lightning_n2uq.ops import quantize_weight, threshold_quantize
from lightning_n2uq.ops.backends.triton import tables
from lightning_n2uq.ops.backends.triton.product import INTERPRETED
from lightning_n2uq.ops.dispatch import force
from lightning_n2uq.ops.tables import QuantizerParameters, operator_tables


def assert_equal(slow: Tensor, fast: Tensor) -> None:
    assert torch.equal(slow.isnan(), fast.isnan())
    assert torch.equal(slow.nan_to_num(0.5), fast.nan_to_num(0.5))


def check_threshold(x: Tensor, n: int, ramp: float, first_gradient: float | None = None) -> None:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = (torch.tensor([0.1]), (0.2 + torch.rand(n)) * 2 / n, torch.tensor([1.3]), torch.tensor([0.7]))
    leaves = [x.requires_grad_(), *(v.to(dtype).requires_grad_() for v in values)]
    grad = torch.randn(x.shape).to(x.dtype)
    if first_gradient is not None:
        grad[0] = first_gradient
    results = []
    for kernels in ("reference", "triton"):
        with force(kernels):
            y = threshold_quantize(*leaves, ramp=ramp)
            results.append([y, *torch.autograd.grad(y, leaves, grad)])
    terms = max(1, x.numel()) ** 0.5
    for i, (slow, fast) in enumerate(zip(*results, strict=True)):
        if INTERPRETED.value and x.dtype == torch.bfloat16 and i < 2:  # it truncates where a GPU rounds
            torch.testing.assert_close(slow, fast, rtol=2**-7, atol=1e-6)
        elif i < 2:
            assert_equal(slow, fast)
        else:
            torch.testing.assert_close(slow, fast, rtol=1e-6, atol=2e-6 * terms, equal_nan=True)


def check_tables(n: int, ramp: float, dtype: torch.dtype) -> None:
    """Tables have the bits of those made on the CPU; a width at the floor has no gradient."""
    widths = (0.2 + torch.rand(n)) * 2 / n
    widths[0] = 1e-4
    values = torch.tensor([0.1]), widths, torch.tensor([1.3]), torch.tensor([0.7])
    slow = operator_tables(QuantizerParameters(*values), dtype, ramp)._asdict()
    rows = tables.table_rows(*values, dtype, ramp)
    assert_equal(torch.stack([slow.pop("scale_in"), values[3][0].to(dtype)]), rows[0, :2])
    for row, name in enumerate(tables.ROWS):
        if name in slow:
            assert_equal(slow[name], rows[row, : len(slow[name])])
    records = tables.BY_SEGMENT.value, tables.BY_CODE.value
    segments, codes = (rows[first:].flatten() for first in records)
    thresholds, levels, slopes = slow["thresholds"], slow["levels"], slow["slopes"]
    infinity = torch.full((1,), torch.inf, dtype=dtype)
    expected = (
        torch.cat([infinity, thresholds, infinity]),
        slopes,
        torch.cat([levels[:1], levels[:-1], levels[-1:]]),
        torch.cat([levels[-1:], levels[1:], levels[-1:]]),
    )
    assert torch.equal(segments[: 4 * n + 8].view(-1, 4), torch.stack(expected, 1))
    expected = slow["knots"], levels, slopes[:-1], slopes[1:]
    assert torch.equal(codes[: 4 * n + 4].view(-1, 4), torch.stack(expected, 1))


def check_gradients(n: int, programs: int) -> None:
    """From programs' sums to the gradients; a width at the floor has none."""
    widths = (0.2 + torch.rand(n)) * 2 / n
    widths[0] = 1e-4
    values = QuantizerParameters(torch.tensor([0.1]), widths, torch.tensor([1.3]), torch.tensor([0.7]))
    sums = torch.randn(programs, tables.CLIMBS + n, dtype=torch.float64)
    value, pull, moment, *climbs = sums.sum(0)
    expected = [-0.7 * pull, -0.7 * torch.stack(climbs), 0.7 * moment, value]
    expected[1][0] = 0.0
    for gradient, found in zip(expected, tables.parameter_gradients(sums, values), strict=True):
        torch.testing.assert_close(found.squeeze(), gradient.float().squeeze(), rtol=1e-5, atol=1e-5)


def check_weight(weight: Tensor, bits: int, upstream: Tensor | None = None) -> None:
    """Values and gradients have the reference's bits."""
    leaf = weight.requires_grad_()
    if upstream is None:
        upstream = torch.randn(weight.shape).to(weight.dtype)
    results = []
    for kernels in ("reference", "triton"):
        with force(kernels):
            y = quantize_weight(leaf, bits)
            results.append([y.detach(), *torch.autograd.grad(y, leaf, upstream)])
    for slow, fast in zip(*results, strict=True):
        assert_equal(slow, fast)


def check_few() -> None:
    """Every kernel once or twice, in a fraction of the time of `check_all`."""
    torch.manual_seed(0)
    check_threshold(torch.randn(300) + 0.5, 3, 0.0)
    check_threshold(torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 1e38, 0.4]), 3, 0.5)
    check_tables(3, 0.3, torch.float32)
    check_gradients(3, 900)
    check_weight(torch.randn(3, 40), 3)
    check_weight(torch.tensor([[0.0, 2 / 3, -2 / 3, 4 / 3], [1.0, -1.0, 1.0, -1.0]]), 2)


def check_all() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        check_threshold((torch.randn(1500) + 0.5).to(dtype), 3, 0.0)
        if dtype != torch.bfloat16 or not INTERPRETED.value:
            check_weight(torch.randn(3, 40).to(dtype), 3)
    cases = [(0, 3, 0.0), (1, 3, 0.0), (300, 15, 0.5), (257, 3, 1.0), (1100, 15, 0.0), (200, 40, 0.0)]
    if not INTERPRETED.value:  # it fuses no products
        cases.append((1500, 255, 0.0))
    for numel, n, ramp in cases:
        check_threshold(torch.randn(numel) + 0.5, n, ramp)
    for n, ramp in ((1, 0.0), (3, 0.0), (15, 0.3), (40, 1.0)):
        for dtype in (torch.float32, torch.float64):
            check_tables(n, ramp, dtype)
        check_gradients(n, 300 * n)
    check_gradients(3, 0)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 1e38, 0.4])
    check_threshold(special, 3, 0.0)
    check_threshold(special, 3, 0.5)
    check_threshold(special[1:], 3, 0.0)  # infinite inputs leave finite gradients
    for broken in (torch.nan, torch.inf):
        for where in (-5.0, 0.3, 5.0):
            check_threshold(torch.tensor([where, 0.2, 0.5]), 3, 0.0, broken)
    check_weight(torch.randn(5, 4), 3, torch.randn(5, 4)[:, :1].expand(5, 4))  # not one run of memory
    check_weight(torch.randn(5, 4, 3, 3), 3, torch.randn(5, 3, 3, 4).permute(0, 3, 1, 2))
    weight = torch.randn(5, 9)
    weight[0], weight[1, 2], weight[2, 3] = 0.0, torch.nan, torch.inf
    check_weight(weight, 2)
    check_weight(torch.tensor([[0.0, 2 / 3, -2 / 3, 4 / 3], [1.0, -1.0, 1.0, -1.0]]), 2)
    check_weight(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last), 8)
