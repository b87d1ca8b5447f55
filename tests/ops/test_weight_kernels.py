"""The numba kernel of `quantize_weight` against the reference, bit for bit."""

import pytest
import torch
from torch import Tensor

from lightning_n2uq.ops import quantize_weight, reference
from lightning_n2uq.ops.dispatch import force
from lightning_n2uq.ops.weight import apply_scale, quantize_weight_with_scale

pytest.importorskip("numba")


def assert_same(weight: Tensor, bits: int, gradient: str = "scaled") -> None:
    weight = weight.detach().requires_grad_()
    upstream = torch.randn(weight.shape, dtype=torch.float64).to(weight.dtype)
    results = []
    for kernels in ("reference", "numba"):
        with force(kernels):
            y = quantize_weight(weight, bits, gradient)
            results.append((y, torch.autograd.grad(y, weight, upstream)[0]))
    for slow, fast in zip(*results, strict=True):
        assert slow.stride() == fast.stride()
        assert torch.equal(slow.nan_to_num(0.5), fast.nan_to_num(0.5))
        assert torch.equal(slow.isnan(), fast.isnan())
    expected = reference.quantize_weight_backward(upstream, weight, bits, gradient == "straight_through")
    assert torch.equal(results[1][1].nan_to_num(0.5), expected.nan_to_num(0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_kernel_equals_the_reference(bits: int, dtype: torch.dtype) -> None:
    assert_same(torch.randn(33, 5, 3, 3).to(dtype), bits)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 1), (1, 100_003), (64, 70, 3, 3)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    assert_same(torch.randn(shape), 3, "straight_through")


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
def test_weight_layouts(layout: str) -> None:
    base = torch.randn(8, 6, 3, 4)
    weight = {
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(0, 1),
        "strided": base[:, ::2],
    }[layout]
    assert_same(weight, 2)


def test_special_channels() -> None:
    weight = torch.randn(5, 9)
    weight[0], weight[1, 2], weight[2, 3], weight[3] = 0.0, torch.nan, torch.inf, 1e-42
    assert_same(weight, 2)


def test_ties_round_to_even() -> None:
    weight = torch.tensor([[0.0, 2 / 3, -2 / 3, 4 / 3], [1.0, -1.0, 1.0, -1.0]])
    assert_same(weight, 2)
    assert_same(weight.double(), 2)


def test_the_scale_is_the_mean_in_float64_rounded_once() -> None:
    weight = 10.0 ** torch.empty(64, 501).uniform_(-6, 3)
    for bits in (1, 2, 3, 8):
        exact = weight.double().mean(1, keepdim=True) * ((2**bits - 1) / 2 ** (bits - 1))
        for kernels in ("reference", "numba"):
            with force(kernels):
                assert torch.equal(quantize_weight_with_scale(weight, bits)[1], exact.float())


def test_a_known_scale_gives_the_same_bits() -> None:
    weight = torch.randn(16, 27)
    quantized, scale = quantize_weight_with_scale(weight, 3)
    assert torch.equal(apply_scale(weight, scale, 3), quantized)


@pytest.mark.parametrize("kernels", ["reference", "numba"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_another_dtype_is_the_weight_rounded_once(
    kernels: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    weight = torch.randn(5, 33, 5, 5).contiguous(memory_format=layout)
    weight[1], weight[2, 3] = 0.0, torch.nan
    with force(kernels):
        plain, scale = quantize_weight_with_scale(weight, 3)
        narrow, same = quantize_weight_with_scale(weight, 3, dtype=dtype)
        again = apply_scale(weight, scale, 3, dtype=dtype)
    assert narrow.dtype == dtype
    assert narrow.stride() == weight.stride()
    torch.testing.assert_close(same, scale, rtol=0, atol=0, equal_nan=True)
    for value in (narrow, again):
        torch.testing.assert_close(value, plain.to(dtype), rtol=0, atol=0, equal_nan=True)
    leaf = weight.nan_to_num().requires_grad_()
    quantize_weight_with_scale(leaf, 3, "straight_through", dtype)[0].sum().backward()
    assert leaf.grad.dtype == torch.float32
