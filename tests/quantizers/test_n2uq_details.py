"""N2UQ's quantizers beyond the common interface: comparison at thresholds, ramp, scale."""

import pytest
import torch
from torch import Tensor, nn

from lightning_n2uq.quantizers import EntropyPreservingWeightQuantizer, LearnableThresholdQuantizer


def trained(bits: int = 2) -> LearnableThresholdQuantizer:
    """Uneven thresholds and scales, all exact in binary."""
    quantizer = LearnableThresholdQuantizer(bits)
    with torch.no_grad():
        quantizer.start.fill_(0.25)
        quantizer.widths.copy_(torch.linspace(0.25, 1.0, quantizer.num_levels - 1))
        quantizer.scale_in.fill_(2.0)
        quantizer.scale_out.fill_(0.5)
    return quantizer


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    weight = torch.linspace(-1, 2, x.numel())
    return list(torch.autograd.grad((module(x) * weight).sum(), [x, *module.parameters()]))


@pytest.mark.parametrize(("comparison", "codes"), [(">", [0, 1, 2]), (">=", [1, 2, 3])])
def test_an_input_at_a_threshold_gets_the_code_that_the_comparison_says(
    comparison: str, codes: list[int]
) -> None:
    quantizer = trained()
    at = quantizer.thresholds() / quantizer.scale_in
    quantizer.comparison = comparison
    assert quantizer.codes(at).tolist() == codes
    assert torch.equal(quantizer(at), quantizer.levels()[codes])
    below, above = torch.nextafter(at, at - 1), torch.nextafter(at, at + 1)
    assert quantizer.codes(below).tolist() == [0, 1, 2]
    assert quantizer.codes(above).tolist() == [1, 2, 3]


def test_with_either_comparison_a_value_above_the_threshold_has_the_upper_code() -> None:
    for comparison in (">", ">="):
        quantizer = trained(3)
        quantizer.comparison = comparison
        scaled = torch.cat([t + torch.tensor([-1e-6, 0, 1e-6]) for t in quantizer.thresholds()])
        expected = (scaled[:, None] > quantizer.thresholds()).sum(1)
        assert torch.equal(quantizer.codes(scaled / 2), expected.to(torch.uint8))


def test_both_comparisons_have_the_same_gradients_beside_thresholds() -> None:
    x = torch.randn(200)
    strict, loose = trained(), trained()
    loose.comparison = ">="
    for one, other in zip(gradients(strict, x), gradients(loose, x), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_the_ramp_moves_values_and_the_gradient_only_on_request() -> None:
    x, steep, ramped = torch.randn(200), trained(), trained()
    ramped.ramp = 0.5
    assert not torch.equal(steep(x), ramped(x))
    for one, other in zip(gradients(steep, x)[:1], gradients(ramped, x)[:1], strict=True):
        assert torch.equal(one, other)  # G-STE's
    ramped.ramp_gradient = True
    assert not torch.equal(gradients(steep, x)[0], gradients(ramped, x)[0])


@pytest.mark.parametrize(("ramp", "training"), [(0.0, True), (0.5, False)])
def test_without_a_ramp_its_gradient_changes_nothing(ramp: float, training: bool) -> None:
    x, plain, asked = torch.randn(200), trained(), trained().train(training)
    asked.ramp, asked.ramp_gradient = ramp, True
    assert torch.equal(plain(x), asked(x))
    for one, other in zip(gradients(plain, x), gradients(asked, x), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_weight_is_its_odd_integer_times_the_scale(bits: int, rescale: bool) -> None:
    quantizer = EntropyPreservingWeightQuantizer(bits)
    quantizer.rescale = rescale
    weight = torch.randn(5, 3, 3, 3)
    n, scale = 2**bits - 1, quantizer.scale(weight)
    assert scale.shape == (5, 1, 1, 1)
    assert torch.allclose(quantizer(weight), (2 * quantizer.codes(weight).float() - n) * scale, rtol=1e-6)
    most = weight.abs().amax((1, 2, 3), keepdim=True) if not rescale else None
    mean = weight.abs().mean((1, 2, 3), keepdim=True) * n / 2 ** (bits - 1)
    assert torch.allclose(scale * n, mean if most is None else most, rtol=1e-6)


def test_a_plain_scale_is_kept_by_checkpoints() -> None:
    plain, other = EntropyPreservingWeightQuantizer(2), EntropyPreservingWeightQuantizer(2)
    plain.rescale = False
    other.load_state_dict(plain.state_dict())
    assert other.rescale is False
    other.load_state_dict(EntropyPreservingWeightQuantizer(2).state_dict())
    assert other.rescale is True
    with pytest.raises(ValueError, match="gradient: got 'exact', allowed are "):
        EntropyPreservingWeightQuantizer(2, "exact")
