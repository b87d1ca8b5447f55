"""The variance bound and the distribution of codes."""

import itertools
import math

import pytest
import torch
from codec_cases import code_entropy, code_probabilities, entropy, laplace, make_codec, rounding_variance

from lightning_n2uq.compression import NUQCodec
from lightning_n2uq.compression.theory import best_mantissa_bits, variance_bound
from lightning_n2uq.ops.formats.gradient_codec import NUQFormat


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("bucket_size", [512, 1024, 8192])
def test_exponential_bound_is_the_closed_form(bits, bucket_size):
    s = 2 ** (bits - 1) - 2
    a = 2.0**-s * math.sqrt(bucket_size)
    expected = 1 / 8 + (2 / 9) * 4.0**-s * bucket_size if a <= 9 / 4 else a - 1
    assert NUQCodec(bits=bits, bucket_size=bucket_size).variance_bound() == pytest.approx(expected)


@pytest.mark.parametrize("mantissa_bits", [0, 1, 2, 3])
def test_mantissa_bits_refine_the_upper_region(mantissa_bits):
    codec = NUQCodec(bits=8, bucket_size=8, levels="float", mantissa_bits=mantissa_bits)
    kappa = 4.0**-mantissa_bits / (4 * (1 + 2.0**-mantissa_bits))
    assert codec.variance_bound() == pytest.approx(kappa, rel=2e-3)


def test_default_mantissa_bits_have_the_smallest_bound():
    chosen = best_mantissa_bits(8, 1024, "l2")
    bounds = [NUQCodec(8, levels="float", mantissa_bits=m).variance_bound() for m in range(7)]
    assert chosen == bounds.index(min(bounds)) == NUQCodec(8, levels="float").form.mantissa_bits


@pytest.mark.parametrize(("bits", "family"), [(2, "exponential"), (3, "exponential"), (4, "uniform")])
def test_bound_is_reached_by_a_constant_vector(bits, family):
    """Equal coordinates below the lowest level are the worst case of the `a - 1` branch."""
    codec = make_codec(bits, family, "l2", 1024)
    x = torch.ones(1024)
    relative = float(rounding_variance(x, codec).sum()) / 1024
    assert relative == pytest.approx(codec.variance_bound(), rel=1e-6)


@pytest.mark.parametrize("family", ["exponential", "uniform", "list"])
def test_linf_bound_is_nearly_reached(family):
    codec = make_codec(3, family, "linf", 1024)
    lowest = codec.form.levels[1]
    a = lowest * math.sqrt(1023)
    small = (math.sqrt(1 + a * a) - 1) / a / math.sqrt(1023)
    x = torch.full((1024,), small)
    x[0] = 1.0
    relative = float(rounding_variance(x, codec).sum() / x.double().square().sum())
    assert 0.999 * codec.variance_bound() <= relative <= codec.variance_bound() * (1 + 1e-6)


def test_bound_grows_with_the_bucket_and_shrinks_with_bits():
    sizes = [variance_bound(NUQCodec(bucket_size=d).form) for d in (64, 256, 1024, 4096, 16384)]
    widths = [variance_bound(NUQCodec(bits=b, levels="float").form) for b in (2, 3, 4, 8)]
    assert sizes == sorted(sizes)
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("family", ["exponential", "float", "uniform", "list"])
def test_code_probabilities_match_the_codes_sent(family):
    codec = make_codec(4, family, "l2", 512)
    x = laplace(1 << 18)
    expected = code_probabilities(x, codec.form)
    payload = codec.encode(x, seed=2)
    assert float(expected.sum()) == pytest.approx(1.0)
    assert entropy(expected) == pytest.approx(code_entropy(payload, codec.form, x.numel()), abs=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("bucket_size", [8, 64, 1024])
def test_linf_bound_is_the_closed_form(bits, bucket_size):
    form = NUQFormat(bits, bucket_size, "linf", "uniform")
    levels = form.levels[1:]
    narrow = max(((b - a) ** 2 / (4 * a * b) for a, b in itertools.pairwise(levels)), default=0.0)
    wide = (math.sqrt(1 + levels[0] ** 2 * (bucket_size - 1)) - 1) / 2
    assert variance_bound(form) == pytest.approx(max(narrow, wide), rel=1e-9)
