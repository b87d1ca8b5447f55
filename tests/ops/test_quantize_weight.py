"""`quantize_weight` against docs/numerics.md."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_n2uq.ops import quantize_weight, reference


@given(bits=st.integers(2, 8), seed=st.integers(0, 999))
def test_values_follow_the_formula(bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64)
    n = 2**bits - 1
    scale = (2**bits - 1) / 2 ** (bits - 1) * weight.abs().mean((1, 2, 3), keepdim=True)
    clamped = (weight / scale).clamp(-1, 1)
    expected = scale * (2 / n * torch.round((clamped + 1) * n / 2) - 1)
    assert torch.allclose(quantize_weight(weight, bits), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_odd_multiples_of_the_step(bits: int) -> None:
    weight = torch.randn(8, 64)
    n = 2**bits - 1
    step = reference.weight_scale(weight, bits) / n
    odd = quantize_weight(weight, bits) / step
    assert torch.allclose(odd, odd.round(), atol=1e-5)
    assert set(odd.round().int().unique().tolist()) == set(range(-n, n + 1, 2))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gaussian_weights_keep_their_entropy(bits: int) -> None:
    weight = torch.randn(4, 20000)
    odd = reference.weight_codes(weight, bits)
    share = torch.stack([(odd == level).double().mean() for level in odd.unique()])
    assert -(share * share.log2()).sum() > 0.95 * bits


def test_rounding_is_half_to_even() -> None:
    # S = 1 for this channel at 2 bits: mean |w| = 2/3. W_s = -1/3 +- 1/3 lies halfway between two levels.
    weight = torch.tensor([[0.0, 2 / 3, -2 / 3, 4 / 3]], dtype=torch.float64)
    assert torch.allclose(reference.weight_scale(weight, 2), torch.ones(1, 1, dtype=torch.float64))
    # (0 + 1) * 1.5 = 1.5 rounds to 2: level 1/3; (2/3 + 1) * 1.5 = 2.5 to 2; (1/3) * 1.5 = 0.5 to 0.
    expected = torch.tensor([[1 / 3, 1 / 3, -1.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(quantize_weight(weight, 2), expected)


def test_gradient_modes() -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64) * 0.1
    upstream = torch.randn_like(weight)
    scale = reference.weight_scale(weight, 2)
    assert (weight / scale).abs().max() > 1  # some are clamped, and get their gradient all the same
    for mode, expected in {"scaled": upstream / scale, "straight_through": upstream}.items():
        leaf = weight.clone().requires_grad_()
        (grad,) = torch.autograd.grad(quantize_weight(leaf, 2, mode), leaf, upstream)
        assert torch.allclose(grad, expected, rtol=1e-12)


def test_a_channel_of_zeros_gives_zeros_and_a_finite_gradient() -> None:
    weight = torch.randn(3, 5)
    weight[1] = 0
    weight.requires_grad_()
    quantized = quantize_weight(weight, 2)
    quantized.sum().backward()
    assert (quantized[1] == 0).all()
    assert (quantized[0] != 0).all()
    assert torch.equal(weight.grad[1], torch.ones(5))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_weights_stay_visible(bad: float) -> None:
    weight = torch.randn(3, 5)
    weight[1, 2] = bad
    quantized = quantize_weight(weight, 2)
    assert not quantized[1].isfinite().all()
    assert quantized[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_layout_are_kept(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 3, 3, 3).to(dtype).to(memory_format=torch.channels_last)
    quantized = quantize_weight(weight, 3)
    assert quantized.dtype == dtype
    assert quantized.is_contiguous(memory_format=torch.channels_last)
    wide = quantize_weight(weight.double(), 3)
    assert torch.allclose(quantized.double(), wide, rtol=1e-2 if dtype.itemsize == 2 else 1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck reads it
@pytest.mark.parametrize("straight_through", [False, True])
def test_weight_opcheck(straight_through: bool) -> None:
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.lightning_n2uq.quantize_weight.default, (weight, 2, straight_through))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), 2), r"weight: got shape \(3,\)"),
        ((torch.zeros(3, 3, dtype=torch.int32), 2), "weight: got dtype torch.int32"),
        ((torch.zeros(3, 3), 0), "bits: got 0, allowed is 1 to 8"),
        ((torch.zeros(3, 3), 9), "bits: got 9, allowed is 1 to 8"),
        ((torch.zeros(3, 3), 2, "ste"), "gradient: got 'ste', allowed are scaled, straight_through"),
    ],
)
def test_bad_weight_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_weight(*arguments)
