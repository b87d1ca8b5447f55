import math

import pytest
import torch

from lightning_n2uq.quantizers import DoReFaWeight, UniformGrid
from lightning_n2uq.quantizers.integers import level_distance, weight_integers
from lightning_n2uq.quantizers.lsq import LSQ, LSQPlus
from lightning_n2uq.quantizers.n2uq import EntropyPreservingWeightQuantizer
from lightning_n2uq.quantizers.positions import level_position


def fitted(signed=True, largest=2.0):
    grid = UniformGrid(8, signed)
    with torch.no_grad():
        grid.log2_range.fill_(math.log2(largest))
    grid.initialize(torch.tensor([largest]))
    return grid


def test_signed_levels_are_symmetric_and_unsigned_ones_start_at_zero():
    assert (fitted().low, fitted().high, fitted().num_levels) == (-127, 127, 255)
    assert (fitted(False).low, fitted(False).high, fitted(False).num_levels) == (0, 255, 256)


@pytest.mark.parametrize("signed", [True, False])
def test_values_are_the_nearest_levels_and_clipped(signed):
    grid = fitted(signed)
    step = grid.step().item()
    x = torch.tensor([-9.0, -0.6 * step, 0.0, 0.4 * step, 2.6 * step, 1.99, 9.0])
    expected = torch.round(x.double() / step).clamp(grid.low, grid.high) * step
    torch.testing.assert_close(grid(x).double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(grid.codes(x).long() + grid.low, torch.round(expected / step).long())


def test_first_batch_sets_the_range_and_a_checkpoint_keeps_it():
    grid = UniformGrid(8).train()
    grid(torch.tensor([0.5, -3.0]))
    assert grid.log2_range.item() == pytest.approx(math.log2(3.0))
    other = UniformGrid(8).train()
    other.load_state_dict(grid.state_dict())
    other(torch.tensor([100.0]))
    assert torch.equal(other.log2_range, grid.log2_range)


def test_gradients_are_those_of_lsq_through_the_logarithm():
    grid = fitted()
    x = torch.tensor([-9.0, -0.3, 0.7, 1.1, 9.0], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0])
    (grid(x) * upstream).sum().backward()
    assert x.grad.tolist() == [0.0, 2.0, -1.0, 0.5, 0.0]
    step = grid.step().float()
    inside = torch.round(x.detach() / step) - x.detach() / step
    by_step = torch.where(x.detach().abs() > 2, x.detach().sign() * 127, inside)
    expected = (by_step * upstream).sum() / math.sqrt(5 * 127) * step * math.log(2)
    torch.testing.assert_close(grid.log2_range.grad, expected.reshape(1), rtol=1e-4, atol=1e-7)


def test_a_sum_is_that_of_both_on_the_grid_and_stays_on_it():
    grid = fitted()
    left, right = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).unbind(0)
    step = grid.step()
    total = grid.add(left, right)
    both = torch.round(grid(left).double() / step) + torch.round(grid(right).double() / step)
    assert torch.equal(torch.round(total.double() / step), both.clamp(-127, 127))
    assert (both.abs() > 127).any(), "some sums are to be clipped"


def test_first_sum_sets_the_range_to_both_magnitudes():
    grid = UniformGrid(8).train()
    grid.add(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]))
    assert grid.log2_range.item() == pytest.approx(math.log2(5.0))


def test_not_a_number_stays_visible():
    assert fitted()(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize("signed", [True, False])
def test_positions_between_levels_round_to_the_codes(signed):
    grid = fitted(signed)
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(level_position(grid, x).round().to(torch.uint8), grid.codes(x))


@pytest.mark.parametrize(
    "quantizer",
    [
        EntropyPreservingWeightQuantizer(2),
        LSQ(3, signed=True),
        LSQPlus(3, signed=True),
        DoReFaWeight(4),
        UniformGrid(8),
    ],
)
def test_integers_times_scale_are_the_quantized_weight(quantizer):
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    quantizer.train()(weight)
    levels = weight_integers(quantizer.eval(), weight)
    product = levels.integers.double() * levels.scale.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(product.float(), quantizer(weight), rtol=1e-5, atol=1e-6)


def test_quantizers_with_an_offset_have_no_distance_of_levels():
    assert level_distance(LSQPlus(2), torch.ones(1)) is None
    assert level_distance(LSQ(2), torch.ones(1)) is not None
