import pytest
import torch

from lightning_n2uq.quantizers import LSQ, EntropyPreservingWeightQuantizer, LearnableThresholdQuantizer
from lightning_n2uq.quantizers.bit_width import change_bits, map_thresholds


def smooth_quantizer(bits):
    """Widths that vary slowly, as learned ones of many bits do."""
    quantizer = LearnableThresholdQuantizer(bits)
    with torch.no_grad():
        wave = torch.linspace(0, 3, quantizer.widths.numel()).cos()
        quantizer.widths.mul_(1 + 0.5 * wave)
        quantizer.start.fill_(-0.2)
    return quantizer


@pytest.mark.parametrize(("fine", "coarse"), [(8, 4), (4, 2), (8, 2), (6, 3)])
def test_the_coarser_code_is_the_finer_one_rounded(fine, coarse):
    quantizer = smooth_quantizer(fine)
    x = torch.linspace(-1, 3, 4001, dtype=torch.float64)
    ratio = (2**fine - 1) // (2**coarse - 1)
    expected = torch.round(quantizer.codes(x) / ratio)
    thresholds = quantizer.thresholds()
    change_bits(quantizer, coarse)
    assert (quantizer.codes(x) != expected).float().mean() < 1e-3  # points within rounding of a threshold
    nearest = (quantizer.thresholds()[:, None] - thresholds).abs().min(1).values
    assert nearest.max() < 1e-5  # each is a threshold of the finer quantizer


def test_going_up_and_down_again_is_a_round_trip():
    quantizer = smooth_quantizer(2)
    before = [p.detach().clone() for p in (quantizer.start, quantizer.widths)]
    change_bits(quantizer, 8)
    assert quantizer.widths.shape == (255,)
    change_bits(quantizer, 2)
    torch.testing.assert_close(quantizer.start.detach(), before[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(quantizer.widths.detach(), before[1], rtol=0, atol=1e-4)


def test_wild_widths_still_give_positive_widths():
    widths = torch.tensor([1.0, 0.01, 1.0, 0.01, 0.9, 0.01, 0.01, 1.2, 0.02, 0.5, 0.01, 0.01, 2.0, 0.1, 0.1])
    for steps in (1, 3, 7, 31):
        _, mapped = map_thresholds(torch.zeros(1), widths, steps)
        assert mapped.shape == (steps,)
        assert bool((mapped > 1e-3).all())


def test_weights_change_bits_without_parameters():
    quantizer = EntropyPreservingWeightQuantizer(8)
    assert change_bits(quantizer, 2) == {}
    weight = torch.randn(4, 100)
    assert torch.equal(quantizer(weight), EntropyPreservingWeightQuantizer(2)(weight))


def test_other_methods_and_widths_are_refused():
    with pytest.raises(ValueError, match="quantizer: got LSQ"):
        change_bits(LSQ(4), 2)
    with pytest.raises(ValueError, match="bits: got 1"):
        change_bits(LearnableThresholdQuantizer(4), 1)
