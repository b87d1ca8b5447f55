"""The fused operators on channels-last maps: kernels against the reference, layouts, dtypes, threads."""

import pytest
import torch
from torch import Tensor

from lightning_n2uq.ops.backends.common.planes import empty_map
from lightning_n2uq.ops.backends.common.rows import is_rows, units
from lightning_n2uq.ops.dispatch import force, load
from lightning_n2uq.ops.formats.fused_activation import NormParameters, PReLUParameters, Window
from lightning_n2uq.ops.fused_activation import OP, packed_activation
from lightning_n2uq.ops.fused_conv import Geometry, PackedInput, QuantizedWeight, packed_conv2d
from lightning_n2uq.ops.residual import residual_activation
from lightning_n2uq.ops.stem import norm_relu_pool
from lightning_n2uq.ops.tables import QuantizerParameters

pytest.importorskip("numba")
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    (2, 3, 5, 7),
    (1, 2, 1, 3),  # fewer values than a unit
    (3, 16, 4, 4),
    (2, 17, 9, 9),  # units of 28 rows, the last one ragged
    (3, 64, 14, 14),
    (2, 200, 5, 5),  # two rows to a unit
    (2, 512, 7, 7),
    (2, 513, 3, 3),  # a row is two units of unequal size
    (1, 1100, 3, 2),
]


def channels_last(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_(x.requires_grad)


def norm_of(channels: int) -> NormParameters:
    return NormParameters(
        torch.randn(channels).requires_grad_(), torch.randn(channels).requires_grad_(), 1e-5
    )


def act_of(channels: int) -> PReLUParameters:
    return PReLUParameters(*(torch.randn(channels).requires_grad_() for _ in range(3)))


def quantizer_of(bits: int) -> QuantizerParameters:
    n = 2**bits - 1
    values = torch.tensor([0.1]), (0.3 + torch.rand(n)) * 2 / n, torch.tensor([1.3]), torch.tensor([-0.7])
    return QuantizerParameters(*(value.requires_grad_() for value in values))


def check(results: list[list[Tensor]], x: Tensor, exact: int) -> None:
    """Kernels and reference agree: maps in every bit and in layout, sums up to the order of additions.

    A channel whose statistics differ in the last bit (float64 sums in another order, rounded to float32) is
    left out of the comparison of maps; there are few.
    """
    slow, fast = results
    same = (slow[-1] == fast[-1]).all(0) if slow[-1].numel() else torch.ones(x.shape[1], dtype=torch.bool)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(slow[-1], fast[-1], rtol=1.3e-7, atol=1e-7)
    for i, (a, b) in enumerate(zip(slow[:-1], fast[:-1], strict=True)):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        if i < exact:
            assert a.dtype == x.dtype
            assert is_rows(b)
            assert torch.equal(a[:, same], b[:, same])
        else:
            scale = max(1.0, float(a.detach().abs().max()))
            torch.testing.assert_close(a, b, rtol=1e-6, atol=(1e-5 if same.all() else 1e-3) * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("parts", "bits"),
    [("", 3), ("norm", 2), ("act", 3), ("norm act", 1), ("norm act", 2), ("norm act", 4), ("norm act", 8)],
)
def test_activation_equals_the_reference(
    parts: str, bits: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = channels_last(torch.randn(shape) * 2 + 0.3, dtype).requires_grad_()
    norm = norm_of(shape[1]) if "norm" in parts else None
    act = act_of(shape[1]) if "act" in parts else None
    quantizer, grad, results, packed = quantizer_of(bits), torch.randn(shape).to(dtype), [], []
    leaves = [x, *(norm or ())[:2], *(act or ()), *quantizer]
    for kernels in ("reference", "numba"):
        with force(kernels):
            y, codes, stats = packed_activation(x, norm, act, quantizer, dtype)
            results.append([y, *torch.autograd.grad(y, leaves, grad), stats])
            packed.append(codes)
            rebuilt = load(OP, CPU).rebuild(codes, quantizer.scale_out, bits, shape, dtype)
            assert torch.equal(rebuilt, y)
            assert rebuilt.stride() == y.stride()
    check(results, x, exact=2)
    if torch.equal(results[0][-1], results[1][-1]):
        assert torch.equal(*packed)


@pytest.mark.parametrize("kernels", ["reference", "numba"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 3, 7])
def test_a_map_of_codes_is_the_map_of_floats(bits: int, dtype: torch.dtype, kernels: str) -> None:
    x, quantizer = channels_last(torch.randn(2, 20, 9, 9), dtype), quantizer_of(bits)
    x[0, 1], x[1, 2, 3, 3] = torch.nan, torch.inf
    with force(kernels):
        y, packed, _ = packed_activation(x, None, act := act_of(20), quantizer, torch.float32)
        codes, same, _ = packed_activation(x, None, act, quantizer, torch.uint8)
        assert load(OP, CPU).has_nan(packed)
    n = 2**bits - 1
    levels = torch.arange(n + 1).double() * (2 / n) * quantizer.scale_out.detach().double()
    assert is_rows(codes)
    assert torch.equal(packed, same)
    assert torch.equal(levels.float()[codes.long()][~y.isnan()], y[~y.isnan()])
    assert (codes[y.isnan()] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_planes_have_the_same_values(dtype: torch.dtype) -> None:
    plain = (torch.randn(3, 20, 9, 9) * 2).to(dtype).requires_grad_()
    x, norm, act, quantizer = channels_last(plain.detach(), dtype), norm_of(20), act_of(20), quantizer_of(3)
    x.requires_grad_()
    ours, theirs = (packed_activation(v, norm, act, quantizer, dtype)[0] for v in (x, plain))
    grad = torch.randn(plain.shape).to(dtype)
    assert is_rows(ours)
    assert theirs.is_contiguous()
    assert (ours == theirs).float().mean() > 0.99
    (dx,), (expected,) = torch.autograd.grad(ours, x, grad), torch.autograd.grad(theirs, plain, grad)
    torch.testing.assert_close(dx, expected.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("second", [False, True])
def test_residual_equals_the_reference(second: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, other = (channels_last(torch.randn(shape), dtype).requires_grad_() for _ in range(2))
    norm, other_norm, act = norm_of(shape[1]), norm_of(shape[1]) if second else None, act_of(shape[1])
    leaves, grad, results = [x, other, *norm[:2], *act, *(other_norm or ())[:2]], torch.randn(shape), []
    for kernels in ("reference", "numba"):
        with force(kernels):
            y, stats, other_stats = residual_activation(x, norm, other, other_norm, act)
            grads = torch.autograd.grad(y, leaves, grad.to(dtype))
            results.append([y, *grads, torch.cat([stats, other_stats]) if second else stats])
    check(results, x, exact=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 13, 17), (3, 16, 28, 28), (1, 64, 9, 30), (2, 17, 33, 9)])
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2), (7, 4, 3), (3, 5, 1)])
def test_stem_equals_the_reference(
    window: tuple[int, int, int], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = channels_last((torch.randn(shape) * 2).round(), dtype).requires_grad_()  # many equal maxima
    norm, grad, results = norm_of(shape[1]), None, []
    for kernels in ("reference", "numba"):
        with force(kernels):
            y, stats = norm_relu_pool(x, norm, Window(*window))
            grad = torch.randn(y.shape).to(dtype) if grad is None else grad
            results.append([y, *torch.autograd.grad(y, [x, *norm[:2]], grad), stats])
    check(results, x, exact=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", ["reference", "numba"])
def test_nan_and_infinity_stay_visible(kernels: str, dtype: torch.dtype) -> None:
    x = channels_last(torch.randn(2, 16, 8, 8), dtype)
    x[0, 5, 1, 1], x[1, 3, 7, 7], x[1, 4, 7, 7] = torch.nan, torch.inf, -torch.inf
    x.requires_grad_()
    act, quantizer = PReLUParameters(*torch.rand(3, 16)), quantizer_of(2)
    with force(kernels):
        y, packed, _ = packed_activation(x, None, act, quantizer, dtype)
        rebuilt = load(OP, CPU).rebuild(packed, quantizer.scale_out, 2, y.shape, dtype)
        dx, *grads = torch.autograd.grad(y, [x, *quantizer], torch.ones_like(y))
        pooled, _ = norm_relu_pool(x, norm_of(16), Window(3, 2, 1))
        summed, _, _ = residual_activation(x, norm_of(16), x, None, act_of(16))
    assert y.isnan().nonzero().tolist() == [[0, 5, 1, 1]]
    assert rebuilt[0, 5, 1, 1].isnan()
    assert rebuilt[1].isfinite().all()
    assert dx.isnan().nonzero().tolist() == [[0, 5, 1, 1]]
    assert all(g.isnan().any() for g in grads)
    for value in (pooled, summed):  # a norm spreads what is not finite over its channel
        assert value[:, [3, 4, 5]].isnan().any(0).any(1).any(1).all()
        assert value[:, [0, 1, 2, *range(6, 16)]].isfinite().all()


def test_threads_change_no_bit() -> None:
    x, other = (channels_last(torch.randn(6, 64, 40, 40)).requires_grad_() for _ in range(2))
    norm, act, quantizer, before = norm_of(64), act_of(64), quantizer_of(3), torch.get_num_threads()
    grad, pooled, results = torch.randn(x.shape), torch.randn(6, 64, 20, 20), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y, codes, stats = packed_activation(x, norm, act, quantizer, torch.float32)
            results.append([y, codes, stats])
            results[-1] += torch.autograd.grad(y, [x, *norm[:2], *act, *quantizer], grad)
            y = residual_activation(x, norm, other, norm, act)[0]
            results[-1] += [y, *torch.autograd.grad(y, [x, other, *norm[:2], *act], grad)]
            y = norm_relu_pool(x, norm, Window(3, 2, 1))[0]
            results[-1] += [y, *torch.autograd.grad(y, [x, *norm[:2]], pooled)]
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_units_cover_a_map_once() -> None:
    for channels in (1, 3, 16, 17, 64, 128, 129, 200, 256, 512, 513, 1024, 1025, 2048):
        form = units(channels)
        assert form.period % channels == 0
        assert (form.parts - 1) * form.size < form.period <= form.parts * form.size
        assert form.size <= 512
        assert form.fold * 4 in (0, form.size)
        assert form.fold % channels == 0


def test_results_have_the_layout_of_the_input() -> None:
    for x in (torch.empty(2, 3, 4, 5), channels_last(torch.empty(2, 3, 4, 5)), torch.empty(2, 3, 1, 1)):
        assert empty_map(x, torch.float32).stride() == x.stride()
    mixed = torch.randn(2, 3, 4, 5).transpose(2, 3)  # neither: contiguous
    assert packed_activation(mixed, None, None, quantizer_of(2), torch.float32)[0].is_contiguous()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck reads it
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    x, other = (channels_last(torch.randn(2, 3, 6, 6), dtype).requires_grad_() for _ in range(2))
    ops, act = torch.ops.lightning_n2uq, act_of(3)
    for arguments in ((*norm_of(3), *act), (None, None, 1e-5, None, None, None)):
        torch.library.opcheck(ops.packed_activation.default, (x, *arguments, *quantizer_of(2), dtype))
    torch.library.opcheck(ops.norm_relu_pool.default, (x, *norm_of(3), 3, 2, 1))
    for second in ((None, None), norm_of(3)[:2]):
        torch.library.opcheck(ops.residual_activation.default, (x, *norm_of(3), other, *second, 1e-3, *act))


def test_strided_points_of_few_channels_have_the_gradients_of_contiguous_ones() -> None:
    """oneDNN itself writes past a buffer here, which ends the process or spoils the gradient."""
    weight, quantizer, geometry = (
        torch.randn(8, 4, 1, 1),
        quantizer_of(2),
        Geometry((2, 2), (0, 0), (1, 1), 1),
    )
    plain = torch.randn(8, 4, 16, 16)
    grad, results = torch.randn(8, 8, 8, 8), []
    for order in (torch.contiguous_format, torch.channels_last):
        x = plain.clone(memory_format=order).requires_grad_()
        kept = weight.clone(memory_format=order).requires_grad_()
        y, packed, _ = packed_activation(x, None, None, quantizer, torch.float32)
        source = PackedInput(y, packed, quantizer.scale_out, 2)
        out = packed_conv2d(source, QuantizedWeight(kept), None, geometry)
        results.append(torch.autograd.grad(out, [x, kept], grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
