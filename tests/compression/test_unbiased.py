"""Unbiasedness and variance over 2,000 draws, for every bit width, family, norm, shape and magnitude.

One vector is one bucket; tiling it 2,000 times draws 2,000 times, since random numbers depend on the bucket.
Seeds are fixed. Bounds are chosen for the number of comparisons: about 100,000 coordinates are compared.
"""

import math

import pytest
import torch
from codec_cases import all_codecs, label, laplace, make_codec, rounding_variance, vectors

from lightning_n2uq.compression import NUQCodec
from lightning_n2uq.compression.registry import make_codec as named_codec
from lightning_n2uq.ops.backends.reference.gradient_codec import decoded, encoded

DRAWS = 2000
NUMEL = 128
MAGNITUDES = (1e-35, 1.0, 1e35)
CODECS = all_codecs(NUMEL)


def draws(codec: NUQCodec, x: torch.Tensor, seed: int) -> torch.Tensor:
    tiled = x.repeat(DRAWS)
    return codec.decode(codec.encode(tiled, seed), tiled.numel()).view(DRAWS, -1).double()


@pytest.mark.parametrize("codec", CODECS, ids=label)
def test_mean_within_four_standard_errors(codec):
    for seed, (name, vector) in enumerate(vectors(NUMEL).items()):
        for magnitude in MAGNITUDES:
            x = (vector.double() * magnitude).float()
            decoded = draws(codec, x, seed)
            variance = rounding_variance(x, codec)
            error = decoded.mean(dim=0) - x.double()
            slack = 1e-6 * x.abs().double() + 1e-44  # fp32 arithmetic of norm, level and product
            case = f"{name} at {magnitude}"

            # Bernstein's inequality holds for rare events too; family-wise chance of a false alarm 1e-3.
            gap = rounding_gap(x, codec)
            log_term = math.log(2 * 1e5 / 1e-3)
            bound = (
                log_term * gap / 3 + ((log_term * gap / 3) ** 2 + 2 * log_term * DRAWS * variance).sqrt()
            ) / DRAWS
            assert (error.abs() <= bound + slack).all(), case

            # The literal four standard errors, for the shrinkage or growth of the whole vector ...
            total = (error * x.sign()).sum().abs()
            assert total <= 4 * (variance.sum() / DRAWS).sqrt() + slack.sum(), case

            # ... and for the coordinates whose mean is normal enough to judge (some 25 events expected).
            normal = variance * DRAWS > 25 * gap**2
            beyond = error.abs() > 4 * (variance / DRAWS).sqrt() + slack
            assert (beyond & normal).sum() <= 1, case

            squared = (decoded - x.double()).square().sum(dim=1)
            spread = squared.std() / math.sqrt(DRAWS)
            assert (
                squared.mean() - variance.sum()
            ).abs() <= 4.5 * spread + slack.sum() ** 2 + 1e-5 * variance.sum()
            assert variance.sum() <= codec.variance_bound() * x.double().square().sum() * (1 + 1e-6), case


def rounding_gap(x, codec):
    """Distance between the two levels a coordinate is rounded to."""
    norm = x.double().norm() if codec.form.norm == "l2" else x.double().abs().max()
    levels = torch.tensor(codec.form.levels, dtype=torch.float64)
    ratio = (x.double().abs() / norm).nan_to_num(0.0).clamp(max=1.0)
    lower = (torch.bucketize(ratio, levels, right=True) - 1).clamp(max=len(levels) - 2)
    return (levels[lower + 1] - levels[lower]) * norm


@pytest.mark.parametrize(
    ("levels", "bucket_size", "reference"),
    [
        ("exponential", 512, 0.094),
        ("exponential", 1024, 0.100),
        ("exponential", 8192, 0.33),
        ("uniform", 512, 1.3),
        ("uniform", 1024, 2.2),
        ("uniform", 8192, 8.1),
    ],
)
def test_relative_variance_of_laplace_data(levels, bucket_size, reference):
    codec = NUQCodec(bits=4, bucket_size=bucket_size, levels=levels)
    x = laplace(1 << 20)
    error = codec.decode(codec.encode(x, seed=5), x.numel()) - x
    relative = float(error.square().sum() / x.square().sum())
    assert relative == pytest.approx(reference, rel=0.07)
    assert relative <= codec.variance_bound()


@pytest.mark.parametrize(
    ("name", "most"), [("nuqsgd_2bit", 2.2), ("nuqsgd_3bit", 0.23), ("nuqsgd", 0.11), ("nuqsgd_8bit", 2e-3)]
)
def test_named_variants_can_be_trained_with(name, most):
    """Error of a gradient relative to its own square: with ``l2`` and 1024, 2 bits would have 22."""
    codec = named_codec(name)
    x = laplace(1 << 20)
    error = codec.decode(codec.encode(x, seed=5), x.numel()) - x
    assert 0 < error.square().sum() / x.square().sum() < most


@pytest.mark.parametrize("codec", CODECS, ids=label)
def test_random_numbers_decide_between_the_two_neighbours(codec):
    """With the lowest random numbers everything positive goes up, with the highest everything goes down."""
    x = laplace(NUMEL, seed=3).abs()
    lowest = torch.zeros(1, NUMEL, dtype=torch.int64)
    up = decoded(encoded(x, codec.form, lowest + 0xFFFFFFFF), codec.form, NUMEL)
    down = decoded(encoded(x, codec.form, lowest), codec.form, NUMEL)
    if codec.form.family != "float":  # there a large random number means up, elsewhere a small one
        up, down = down, up
    below_lowest = (
        x.double() / (x.double().norm() if codec.form.norm == "l2" else x.max()) < codec.form.levels[1]
    )
    if codec.form.family == "float":
        up, down = torch.where(below_lowest, down, up), torch.where(below_lowest, up, down)
    assert (up >= x * (1 - 1e-6)).all()
    assert (down <= x * (1 + 1e-6)).all()


def test_values_on_levels_are_fixed_points():
    codec = make_codec(4, "exponential", "linf", 8)
    x = torch.tensor([1.0, -0.5, 0.25, -0.125, 0.0625, -0.03125, 0.015625, 0.0]) * 3.0
    assert torch.equal(codec.decode(codec.encode(x, seed=1), 8), x)
