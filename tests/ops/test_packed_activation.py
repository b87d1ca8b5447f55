"""The fused pre-activation chain against plain layers, and its kernels against the reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_n2uq.ops import threshold_quantize
from lightning_n2uq.ops.backends.common.planes import packed_bytes
from lightning_n2uq.ops.backends.reference import fused_activation as fused_reference
from lightning_n2uq.ops.dispatch import force, load
from lightning_n2uq.ops.formats.fused_activation import NormParameters, PReLUParameters
from lightning_n2uq.ops.fused_activation import OP, packed_activation
from lightning_n2uq.ops.tables import QuantizerParameters

pytest.importorskip("numba")
CPU = torch.device("cpu")
EPS = 1e-5


class Case:
    """Input and parameters of one chain; `leaves` lists them all."""

    def __init__(self, shape: tuple[int, ...], bits: int, norm: bool, act: bool) -> None:
        channels, n = shape[1], 2**bits - 1
        self.x = (torch.randn(shape) * 2 + 0.3).requires_grad_()
        affine = (torch.rand(channels) + 0.5, torch.randn(channels) * 0.3)
        self.norm = NormParameters(*affine, EPS) if norm else None
        self.act = PReLUParameters(*torch.rand(3, channels)) if act else None
        widths = (0.3 + torch.rand(n)) * 2 / n
        scales = torch.tensor([1.3]), torch.tensor([0.7])
        self.quantizer = QuantizerParameters(torch.tensor([0.1]), widths, *scales)
        self.leaves = [self.x, *(self.norm or ())[:2], *(self.act or ()), *self.quantizer]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def fused(self) -> tuple[Tensor, Tensor, Tensor]:
        return packed_activation(self.x, self.norm, self.act, self.quantizer, torch.float32)

    def plain(self) -> Tensor:
        z = self.x
        if self.norm:
            z = F.batch_norm(z, None, None, *self.norm[:2], training=True, eps=EPS)
        if self.act:
            shape = (1, -1) + (1,) * (z.dim() - 2)
            z = F.prelu(z + self.act.bias_in.view(shape), self.act.slope) + self.act.bias_out.view(shape)
        return threshold_quantize(z, *self.quantizer)


SHAPES = [
    (2, 3, 5, 7),
    (1, 2, 1, 3),
    (3, 4, 28, 28),
    (2, 2, 600),
    (2, 1, 24, 24),
    (12, 3, 7, 7),  # ten planes to a block, then two
    (9, 70, 6),  # many planes to a block, many channels to a histogram
    (5, 2, 11, 12),
]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_kernel_equals_the_reference(bits: int, shape: tuple[int, ...], act: bool, norm: bool) -> None:
    case = Case(shape, bits, norm, act)
    grad, results = torch.randn(shape), []
    for kernels in ("reference", "numba"):
        with force(kernels):
            y, codes, stats = case.fused()
            results.append([y, codes, stats, *torch.autograd.grad(y, case.leaves, grad)])
    stats = [result.pop(2) for result in results]  # float64 sums in another order, rounded to float32
    torch.testing.assert_close(*stats, rtol=1.3e-7, atol=1e-7)
    same = (stats[0] == stats[1]).all(0) if norm else torch.ones(shape[1], dtype=torch.bool)
    assert same.float().mean() > 0.95
    for name, slow, fast in zip(["y", "codes", "dx"], *results, strict=False):
        assert torch.equal(slow[:, same], fast[:, same]), name
    for slow, fast in zip(results[0][3:], results[1][3:], strict=True):
        torch.testing.assert_close(slow, fast, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kernels", ["reference", "numba"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_a_map_of_codes_is_the_map_of_floats(
    bits: int,
    shape: tuple[int, ...],
    norm: bool,
    kernels: str,
) -> None:
    case = Case(shape, bits, norm, act=norm)
    with torch.no_grad(), force(kernels):
        case.x[0, 0] = torch.nan
        case.x[-1, -1].view(-1)[0] = torch.inf
        plain = packed_activation(case.x, case.norm, case.act, case.quantizer, torch.float32)
        coded = packed_activation(case.x, case.norm, case.act, case.quantizer, torch.uint8)
        module = load(OP, CPU, kernels)
    assert torch.equal(plain[1], coded[1])
    torch.testing.assert_close(plain[2], coded[2], rtol=0, atol=0, equal_nan=True)
    assert coded[0].dtype == torch.uint8
    assert module.has_nan(coded[1])
    n = case.quantizer.widths.numel()
    levels = torch.arange(n + 1).double() * (2 / n) * case.quantizer.scale_out.detach().double()
    known = ~plain[0].isnan()
    assert torch.equal(levels.float()[coded[0].long()][known], plain[0][known])
    assert (coded[0][~known] == 0).all()


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_chain_without_norm_equals_plain_layers(shape: tuple[int, ...], act: bool) -> None:
    case = Case(shape, 3, norm=False, act=act)
    grad = torch.randn(shape)
    y, plain = case.fused()[0], case.plain()
    assert torch.equal(y, plain)
    fused_grads = torch.autograd.grad(y, case.leaves, grad)
    plain_grads = torch.autograd.grad(plain, case.leaves, grad)
    assert torch.equal(fused_grads[0], plain_grads[0])
    for a, b in zip(fused_grads, plain_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_chain_with_norm_equals_plain_layers() -> None:
    case = Case((4, 8, 14, 14), 2, norm=True, act=True)
    grad = torch.randn(case.x.shape)
    y, _, stats = case.fused()
    plain = case.plain()
    # The norms differ in the last bits, so that a value next to a threshold may fall to its other side.
    assert (y != plain).sum() <= 2
    variance, mean = torch.var_mean(case.x, (0, 2, 3), correction=0)
    torch.testing.assert_close(stats, torch.stack([mean, variance]))
    fused_grads = torch.autograd.grad(y, case.leaves, grad)
    for a, b in zip(fused_grads, torch.autograd.grad(plain, case.leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)


@given(bits=st.integers(1, 8), pixels=st.integers(1, 70), seed=st.integers(0, 99))
def test_packing_is_a_round_trip(bits: int, pixels: int, seed: int) -> None:
    codes = torch.randint(2**bits, (2, 3, pixels), generator=torch.Generator().manual_seed(seed))
    packed = fused_reference.pack(codes, torch.zeros(codes.shape, dtype=torch.bool), bits)
    assert packed.shape == (2, 3, packed_bytes(pixels, bits))
    outputs = torch.arange(2.0**bits)
    for backend in ("reference", "numba"):
        rebuilt = load(OP, CPU, backend).unpack(packed, outputs, codes.shape, torch.float32)
        assert torch.equal(rebuilt, codes.float())


@pytest.mark.parametrize("kernels", ["reference", "numba"])
def test_codes_rebuild_the_output_exactly(kernels: str) -> None:
    case = Case((3, 5, 9, 11), 3, norm=True, act=True)
    with torch.no_grad():
        case.x[1, 2, 3, 4] = torch.inf
    case.norm = None
    with force(kernels):
        y, packed, _ = case.fused()
        rebuilt = load(OP, CPU).rebuild(packed, case.quantizer.scale_out, 3, y.shape, y.dtype)
    assert torch.equal(rebuilt, y)


@pytest.mark.parametrize("kernels", ["reference", "numba"])
def test_nan_stays_visible_in_the_codes(kernels: str) -> None:
    case = Case((2, 3, 4, 4), 2, norm=False, act=True)  # both images in one block: one has the NaN
    with torch.no_grad():
        case.x[1, 2, 0, 0] = torch.nan
    with force(kernels):
        y, packed, _ = case.fused()
        rebuilt = load(OP, CPU).rebuild(packed, case.quantizer.scale_out, 2, y.shape, y.dtype)
        grads = torch.autograd.grad(y, case.leaves, torch.ones_like(y))
    assert y.isnan().nonzero().tolist() == [[1, 2, 0, 0]]
    assert rebuilt[1, 2].isnan().all()
    assert rebuilt.isnan().sum() == 16
    assert grads[0].isnan().sum() == 1
    assert all(g.isnan().any() for g in grads[1:])


def test_nothing_but_the_input_is_kept() -> None:
    case = Case((4, 8, 16, 16), 4, norm=True, act=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        case.fused()
    assert sorted(kept)[-2:] == [16, case.x.numel()]  # the batch's statistics, the input


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_single(dtype: torch.dtype) -> None:
    case = Case((2, 3, 8, 8), 2, norm=True, act=True)
    half = case.x.detach().to(dtype).requires_grad_()
    arguments = case.norm, case.act, case.quantizer
    y = packed_activation(half, *arguments, dtype)[0]
    wide = packed_activation(half.float(), *arguments, torch.float32)[0]
    assert y.dtype == dtype
    assert torch.equal(y, wide.to(dtype))
    grad = torch.randn(y.shape).to(dtype)
    (dx,) = torch.autograd.grad(y, half, grad)
    assert dx.dtype == dtype


@pytest.mark.parametrize("shape", [(4, 16, 40, 40), (8, 512, 7, 7)])
def test_threads_change_no_bit(shape: tuple[int, ...]) -> None:
    case = Case(shape, 3, norm=True, act=True)
    grad, results, before = torch.randn(case.x.shape), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            y, codes, stats = case.fused()
            results.append([y, codes, stats, *torch.autograd.grad(y, case.leaves, grad)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck reads it
@pytest.mark.parametrize("full", [False, True])
def test_packed_activation_opcheck(full: bool) -> None:
    case = Case((2, 3, 4, 4), 2, norm=full, act=full)
    arguments = (
        case.x,
        *(case.norm or (None, None, EPS)),
        *(case.act or (None, None, None)),
        *case.quantizer,
        torch.float32,
    )
    torch.library.opcheck(torch.ops.lightning_n2uq.packed_activation.default, arguments)
