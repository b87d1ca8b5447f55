"""The numba kernels of `threshold_quantize` against the reference: bits of values and input gradients."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_n2uq.ops import threshold_quantize
from lightning_n2uq.ops.dispatch import force, select
from lightning_n2uq.ops.tables import QuantizerParameters, operator_tables, threshold_tables

pytest.importorskip("numba")


def parameters(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    widths = (0.2 + torch.rand(n, generator=generator)) * 2 / n
    values = (torch.tensor([0.1]), widths, torch.tensor([1.3]), torch.tensor([0.7]))
    return [v.to(dtype).requires_grad_() for v in values]


def run(kernels: str, x: Tensor, params: list[Tensor], grad: Tensor, ramp: float = 0.0) -> list[Tensor]:
    with force(kernels):
        y = threshold_quantize(x, *params, ramp=ramp)
        return [y, *torch.autograd.grad(y, [x, *params], grad)]


def assert_same(x: Tensor, params: list[Tensor], ramp: float = 0.0) -> None:
    """Values and input gradients bit for bit, parameter gradients to 1e-6 of the size of their terms."""
    x = x.detach().requires_grad_()
    grad = torch.randn(x.shape, dtype=torch.float64).to(x.dtype)
    slow, fast = run("reference", x, params, grad, ramp), run("numba", x, params, grad, ramp)
    for a, b in zip(slow[:2], fast[:2], strict=True):
        assert a.stride() == b.stride()
        assert a.dtype == b.dtype
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))
    terms = max(1.0, x.numel() ** 0.5)
    for a, b in zip(slow[2:], fast[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * terms, equal_nan=True)


def test_numba_is_the_cpu_default() -> None:
    assert select("threshold_quantize", torch.device("cpu")) == "numba"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 15, 20, 63, 255])
def test_kernel_equals_the_reference(n: int, dtype: torch.dtype) -> None:
    assert_same((torch.randn(3, 1001) + 0.5).to(dtype), parameters(n))


@pytest.mark.parametrize("ramp", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("n", [3, 15])
def test_ramps_equal_the_reference(n: int, ramp: float) -> None:
    assert_same(torch.randn(4097) + 0.5, parameters(n), ramp)
    assert_same(torch.randn(33, dtype=torch.float64) + 0.5, parameters(n, dtype=torch.float64), ramp)


@pytest.mark.parametrize("numel", [0, 1, 2, 7, 511, 512, 513, 16384, 16385, 70001])
def test_any_length(numel: int) -> None:
    assert_same(torch.randn(numel) + 0.5, parameters(3))


@pytest.mark.parametrize("n", [3, 15, 63])
def test_values_around_every_bound(n: int) -> None:
    params = parameters(n)
    with torch.no_grad():
        params[2].fill_(1.0)
    tables = threshold_tables(*params, torch.float32)
    bounds = torch.cat([tables.thresholds, tables.knots])
    infinity = torch.tensor(torch.inf)
    assert_same(
        torch.cat([bounds, torch.nextafter(bounds, infinity), torch.nextafter(bounds, -infinity)]), params
    )


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e38, -1e38, 1e-42])
@pytest.mark.parametrize("n", [3, 63])
def test_special_values(n: int, special: float) -> None:
    x = torch.randn(100)
    x[::7] = special
    assert_same(x, parameters(n))
    assert_same(x, parameters(n), ramp=0.5)


@pytest.mark.parametrize(
    "widths", [[1e-4, 1e-4, 1e-4], [0.5, torch.nan, 0.5], [0.5, torch.inf, 0.5], [-1.0, 2.0, 1e-9]]
)
def test_degenerate_widths(widths: list[float]) -> None:
    start, _, scale_in, scale_out = parameters(3)
    assert_same(torch.randn(200), [start, torch.tensor(widths, requires_grad=True), scale_in, scale_out])


def test_narrow_and_wide_segments_share_a_search_grid() -> None:
    start, widths, scale_in, scale_out = parameters(63)
    with torch.no_grad():
        widths[:60] = 1e-3  # sixty thresholds in one cell
        widths[60:] = 5.0
    assert_same(torch.randn(5000), [start, widths, scale_in, scale_out])


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded"])
def test_kernel_layouts(layout: str) -> None:
    base = torch.randn(4, 6, 8, 10)
    x = {
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(0, 3),
        "strided": base[:, :, ::2, 1::2],
        "expanded": base[:1, :, :1, :1].expand(4, 6, 8, 10),
    }[layout]
    assert_same(x, parameters(7))


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("ramp", [0.0, 0.5])
def test_threads_change_no_bit(ramp: float) -> None:
    x, grad, params = torch.randn(300_001, requires_grad=True), torch.randn(300_001), parameters(7)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(run("numba", x, params, grad, ramp))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_chunks_stay_few_and_whole_for_any_size() -> None:
    from lightning_n2uq.ops.backends.numba.threshold import BLOCK, MAX_CHUNKS, chunking

    for numel in (1, 10**6, 2**31 + 5, 2**40):
        chunks, size = chunking(numel)
        assert size % BLOCK == 0
        assert chunks <= MAX_CHUNKS
        assert (chunks - 1) * size < numel <= chunks * size


@pytest.mark.integration
def test_numba_is_imported_by_the_first_kernel_only() -> None:
    code = (
        "import sys, torch, lightning_n2uq.ops, lightning_n2uq.layers, lightning_n2uq.backbones;"
        "assert 'numba' not in sys.modules;"
        "one = torch.ones(1);"
        "lightning_n2uq.ops.threshold_quantize(torch.ones(9), one, torch.ones(3), one, one);"
        "assert 'numba' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ramp", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("widths", [None, [0.5, torch.nan, -1.0], [1e-3, torch.inf, 0.2]])
def test_tables_in_numpy_have_the_bits_of_those_in_torch(
    widths: list[float] | None, ramp: float, dtype: torch.dtype
) -> None:
    start, random, scale_in, scale_out = parameters(15)
    given = random if widths is None else torch.tensor(widths)
    quantizer = QuantizerParameters(start, given, scale_in, scale_out)
    tables = threshold_tables(*quantizer, dtype, ramp), operator_tables(quantizer, dtype, ramp)
    for slow, fast in zip(*tables, strict=True):
        assert slow.dtype == fast.dtype
        assert slow.shape == fast.shape
        assert torch.equal(slow.nan_to_num(7.0), fast.nan_to_num(7.0))
