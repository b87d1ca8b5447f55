"""Quality of the counter-based random numbers: uniform, independent along and across buckets and seeds."""

import math

import pytest
import torch

from lightning_n2uq.ops.backends.common.rng import mix_seed, random_bits


def chi_square_z(counts: torch.Tensor) -> float:
    """Chi-square statistic of equal expectations, as a standard normal deviate."""
    expected = counts.double().mean()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.numel() - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("seed", [0, 1, 2**63, mix_seed(3, 1, 4, 1)])
def test_every_byte_is_uniform(seed):
    bits = random_bits(seed, 512, 1024)
    assert bits.min() >= 0
    assert bits.max() < 2**32
    for shift in (0, 8, 16, 24):
        assert abs(chi_square_z(torch.bincount(((bits >> shift) & 255).view(-1), minlength=256))) < 4.5


@pytest.mark.parametrize(("rows", "columns"), [(0, 1), (0, 2), (0, 512), (1, 0), (2, 0), (1, 1), (64, 8)])
def test_neighbours_are_independent(rows, columns):
    """Pairs at a distance along the bucket, across buckets, or both: 64 x 64 cells of the top bits."""
    top = random_bits(7, 1024, 1024) >> 26
    first = top[: 1024 - rows, : 1024 - columns]
    second = top[rows:, columns:]
    counts = torch.bincount((first * 64 + second).reshape(-1), minlength=4096)
    assert abs(chi_square_z(counts)) < 4.5


@pytest.mark.parametrize("other", [1, 2, 2**32, mix_seed(0, 0, 0, 1)])
def test_seeds_are_independent(other):
    a, b = random_bits(0, 256, 1024).double(), random_bits(other, 256, 1024).double()
    correlation = torch.corrcoef(torch.stack([a.view(-1), b.view(-1)]))[0, 1]
    assert abs(float(correlation)) < 4.5 / math.sqrt(a.numel())


def test_one_seed_bit_flips_half_the_random_bits():
    reference = random_bits(12345, 64, 1024)
    for bit in range(0, 64, 5):
        flipped = reference ^ random_bits(12345 ^ (1 << bit), 64, 1024)
        share = sum(((flipped >> k) & 1).double().mean() for k in range(32)) / 32
        assert abs(float(share) - 0.5) < 5 * 0.5 / math.sqrt(32 * flipped.numel())


def test_no_bucket_repeats_another():
    first_words = random_bits(0, 1 << 16, 8)
    assert len({tuple(row) for row in first_words[:, :2].tolist()}) == 1 << 16
