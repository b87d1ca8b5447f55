"""Another number of thresholds: they lie where the surrogate passes the middle of two new levels."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_n2uq.quantizers import EntropyPreservingWeightQuantizer, LearnableThresholdQuantizer
from lightning_n2uq.quantizers.bit_width import change_bits, map_thresholds


def surrogate_inverse(start: Tensor, widths: Tensor, share: np.ndarray) -> np.ndarray:
    knots = np.concatenate([start.numpy(), start.item() + np.cumsum(widths.double().numpy())])
    return np.interp(share, np.linspace(0, 1, len(knots)), knots)


def thresholds(start: Tensor, widths: Tensor) -> np.ndarray:
    widths = widths.double().numpy()
    return start.item() + np.cumsum(widths) - widths / 2


def smooth(steps: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([0.125]), 0.5 + 0.1 * torch.rand(steps)


@pytest.mark.parametrize(("old", "new"), [(255, 15), (15, 3), (3, 15), (7, 3), (15, 1), (3, 3)])
def test_thresholds_lie_where_the_surrogate_passes_the_middle_of_new_levels(old: int, new: int) -> None:
    start, widths = smooth(old)
    new_start, new_widths = map_thresholds(start, widths, new)
    middles = surrogate_inverse(start, widths, (np.arange(1, new + 1) - 0.5) / new)
    np.testing.assert_allclose(thresholds(new_start, new_widths), middles, rtol=1e-5)
    assert new_widths.dtype == widths.dtype
    near = np.diff(surrogate_inverse(start, widths, np.arange(new + 1) / new))
    sign = np.where(np.arange(new) % 2, -1, 1)
    free = (
        sign * (near - new_widths.double().numpy())
    ).sum()  # of all widths with these thresholds, the nearest
    assert abs(free) < 1e-4
    assert (new_widths.numpy() >= near / 2 - 1e-5).all()


def test_where_no_positive_widths_fit_the_segments_are_taken() -> None:
    start, widths = torch.tensor([0.5]), torch.tensor([0.1] * 7 + [3.0] * 8)
    new_start, new_widths = map_thresholds(start, widths, 3)
    expected = np.diff(surrogate_inverse(start, widths, np.arange(4) / 3))
    np.testing.assert_allclose(new_widths.numpy(), expected, rtol=1e-5)
    assert new_start.item() == 0.5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_another_bit_width_replaces_the_widths_and_says_so(bits: int) -> None:
    quantizer = LearnableThresholdQuantizer(3)
    old = quantizer.widths
    replaced = change_bits(quantizer, bits)
    assert (quantizer.bits, quantizer.num_levels) == (bits, 2**bits)
    assert quantizer.widths.shape == (2**bits - 1,)
    assert (quantizer.widths is old) is (bits == 3)
    assert [(k is old, v is quantizer.widths) for k, v in replaced.items()] == [(True, True)] * (bits != 3)
    assert quantizer(torch.linspace(-1, 3, 4001)).unique().numel() == 2**bits


def test_weights_learn_nothing_and_others_are_refused() -> None:
    quantizer = EntropyPreservingWeightQuantizer(4)
    assert change_bits(quantizer, 2) == {}
    assert quantizer(torch.randn(2, 500)).unique().numel() == 8
    with pytest.raises(ValueError, match="quantizer: got Linear, allowed are the quantizers 'n2uq'"):
        change_bits(nn.Linear(1, 1), 2)
    with pytest.raises(ValueError, match="bits"):
        change_bits(quantizer, 9)


def test_frozen_widths_stay_frozen() -> None:
    quantizer = LearnableThresholdQuantizer(3)
    quantizer.widths.requires_grad_(False)
    change_bits(quantizer, 2)
    assert not quantizer.widths.requires_grad
