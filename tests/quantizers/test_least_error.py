"""Weights with the least squared error: Max's levels, per channel, and the gradient."""

import pytest
import torch
from torch import Tensor

from lightning_n2uq.quantizers import LeastErrorWeight, weight_quantizer


def squared_error(weight: Tensor, distance: float, bits: int) -> float:
    """Mean squared error of the nearest odd multiple of half the distance."""
    levels = (torch.arange(2**bits, dtype=weight.dtype) - (2**bits - 1) / 2) * distance
    nearest = levels[torch.bucketize(weight, (levels[1:] + levels[:-1]) / 2)]
    return float((weight - nearest).square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_no_other_distance_of_levels_has_a_smaller_error_on_normal_weights(bits: int) -> None:
    ranks = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    weight = torch.special.ndtri(ranks).reshape(1, -1)
    quantized = LeastErrorWeight(bits)(weight)
    chosen = float((weight - quantized).square().mean())
    distance = float(torch.diff(quantized.unique()).median())
    assert len(quantized.unique()) == 2**bits
    assert chosen == pytest.approx(squared_error(weight, distance, bits), rel=1e-9)
    for factor in (0.97, 1.03):
        assert chosen < squared_error(weight, factor * distance, bits)
    entropy_preserving = weight_quantizer("n2uq", bits)(weight)
    assert chosen < float((weight - entropy_preserving).square().mean())


def test_least_error_scales_every_channel_by_itself_and_passes_gradients_on() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64) * torch.tensor([0.0, 1, 2, 3, 4]).view(-1, 1, 1, 1)
    quantizer = LeastErrorWeight(4)
    quantized, upstream = quantizer(weight), torch.randn_like(weight)
    assert torch.equal(quantized[0], torch.zeros_like(quantized[0]))
    for channel in range(1, 5):
        half = 0.3352 / 2 * weight[channel].square().mean().sqrt()
        odd = 2 * ((weight[channel] / half - 1) / 2).round().clamp(-8, 7) + 1
        torch.testing.assert_close(quantized[channel], odd * half)
    leaf = weight.clone().requires_grad_()
    (quantizer(leaf) * upstream).sum().backward()
    assert torch.equal(leaf.grad, upstream)
    assert quantizer(weight * float("nan")).isnan().all()
