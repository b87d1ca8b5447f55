"""Rotated buckets: unbiased over 2,000 draws, error, means over ranks, theory, refusals."""

import math

import pytest
import torch
from torch import Tensor

from lightning_n2uq.compression import CODECS, MessageSeed, NUQCodec, make_codec
from lightning_n2uq.compression.rotation_theory import nearest_error, stochastic_error
from lightning_n2uq.distributed import ExchangeConfig
from lightning_n2uq.ops.formats.rotated_codec import RotatedFormat
from lightning_n2uq.ops.gaussian_levels import median_largest, nearest_levels, stochastic_levels

DRAWS = 2000
NUMEL = 128
MOST = {  # relative squared error
    ("stochastic", 2): 0.66,
    ("stochastic", 3): 0.105,
    ("stochastic", 4): 0.022,
    ("eden", 1): 0.60,
    ("eden", 2): 0.14,
    ("eden", 3): 0.038,
    ("eden", 4): 0.0100,
}


def rotated(bits: int, rounding: str, bucket_size: int = 1024) -> NUQCodec:
    return NUQCodec(bits, bucket_size, rotation="hadamard", rounding=rounding)


def distributions(numel: int) -> dict[str, Tensor]:
    """What gradients look like, and what codecs find hard."""
    generator = torch.Generator().manual_seed(numel)
    gauss = torch.randn(numel, generator=generator)
    laplace = torch.empty(numel).exponential_(generator=generator) * gauss.sign()
    chi = torch.randn(3, numel, generator=generator).square().mean(dim=0)
    spike = torch.zeros(numel)
    spike[numel // 3] = -2.0
    two = spike.clone()
    two[numel // 2 + 1] = 2.0
    scales = 10.0 ** torch.arange(-4, 4).repeat_interleave(numel // 8)
    return {
        "gaussian": gauss,
        "laplace": laplace,
        "student": torch.randn(numel, generator=generator) / chi.sqrt(),
        "constant": torch.full((numel,), -0.3),
        "spike": spike,
        "two spikes": two,
        "zeros": torch.zeros(numel),
        "layers": gauss * scales,
        "small": laplace * 1e-35,
        "large": laplace * 1e35,
    }


def draws(codec: NUQCodec, x: Tensor, seed: int, count: int = DRAWS) -> Tensor:
    """Independent messages of one vector: random numbers and rotation depend on the bucket."""
    tiled = x.repeat(count)
    return codec.decode(codec.encode(tiled, seed), tiled.numel()).view(count, -1).double()


def relative_error(codec: NUQCodec, x: Tensor, seed: int = 0) -> float:
    error = codec.decode(codec.encode(x, seed), x.numel()).double() - x.double()
    return float(error.square().sum() / x.double().square().sum().clamp(min=1e-100))


def assert_unbiased(bits: int, numel: int) -> None:
    codec = rotated(bits, "stochastic", numel)
    for seed, (name, x) in enumerate(distributions(numel).items()):
        decoded, norm = draws(codec, x, seed), x.double().norm()
        error = (decoded.mean(dim=0) - x.double()) / norm.clamp(min=1e-100)
        spread = (decoded / norm.clamp(min=1e-100)).std(dim=0) / math.sqrt(DRAWS)
        case = f"{bits} bits, {name}"
        assert (error.abs() > 4 * spread + 1e-6).sum() <= 1, case  # 64 of a million lie beyond by chance
        assert (error.abs() <= 5.5 * spread + 1e-6).all(), case
        shrinkage = (decoded @ x.double() / norm.clamp(min=1e-100) ** 2) - float(name != "zeros")
        assert shrinkage.mean().abs() <= 4 * shrinkage.std() / math.sqrt(DRAWS) + 1e-6, case


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_stochastic_rounding_is_unbiased(bits):
    assert_unbiased(bits, NUMEL)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_stochastic_rounding_is_unbiased_in_buckets_of_1024(bits):
    assert_unbiased(bits, 1024)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_stochastic_rounding_is_unbiased_in_one_rotation(bits):
    """Whatever the rotation: here all messages share one, so that only the rounding is averaged over."""
    codec = rotated(bits, "stochastic", NUMEL)
    for name, x in distributions(NUMEL).items():
        messages = torch.stack([codec.encode(x, MessageSeed(seed, 3)) for seed in range(400)])
        assert torch.equal(messages[0, :8], messages[1, :8]), name
        norm = x.double().norm().clamp(min=1e-100)
        single = torch.stack([codec.decode(row, NUMEL).double() for row in messages[:100]]) / norm
        spread = single.std(dim=0) / math.sqrt(len(messages))
        error = (codec.decode_mean(messages, NUMEL).double() - x.double()) / norm
        assert (error.abs() <= 4.7 * spread + 2e-6).all(), f"{bits} bits, {name}"


@pytest.mark.parametrize(("rounding", "bits"), MOST)
def test_error_is_as_small_as_promised(rounding, bits):
    codec = rotated(bits, rounding)
    for name, x in distributions(65_536).items():
        if name != "two spikes":  # a worst case of its own, below
            assert relative_error(codec, x) <= MOST[rounding, bits], name
            assert relative_error(codec, x) <= codec.variance_bound(), name


@pytest.mark.parametrize("rounding", ["stochastic", "eden"])
def test_one_spike_is_exact(rounding):
    x = distributions(1000)["spike"]
    for bits in (1, 2, 3, 4):
        codec = rotated(bits, rounding, 64)
        torch.testing.assert_close(codec.decode(codec.encode(x, 1), 1000), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("bits", "most"), [(1, 2e-4), (2, 4e-5), (3, 1e-5), (4, 3e-6)])
def test_eden_s_error_is_orthogonal_and_its_bias_is_small(bits, most):
    """The remaining bias, squared and relative to the gradient's square, from two independent means."""
    codec, numel = rotated(bits, "eden"), 1024
    for seed, (name, x) in enumerate(distributions(numel).items()):
        norm = x.double().norm().clamp(min=1e-100)
        halves = []
        for half in range(2):
            decoded = draws(codec, x, 2 * seed + half) / norm
            along = decoded @ (x.double() / norm)
            assert ((along - float(name != "zeros")).abs() <= 1e-4).all(), name
            halves.append(decoded.mean(dim=0) - x.double() / norm)
        if name != "two spikes":  # an error on few coordinates: its mean takes more draws
            assert (halves[0] @ halves[1]).abs() <= most, name


@pytest.mark.parametrize(
    ("rounding", "bits"), [("stochastic", 2), ("stochastic", 4), ("eden", 1), ("eden", 2)]
)
def test_error_of_means_falls_with_the_number_of_ranks(rounding, bits):
    """Equal gradients on all ranks, the hard case: nearest levels need a rotation per message for it."""
    codec, x = rotated(bits, rounding), distributions(65_536)["laplace"]

    def error_of(ranks: int) -> float:
        messages = [codec.encode(x, MessageSeed(rank, 9)) for rank in range(ranks)]
        return float((codec.decode_mean(messages, x.numel()) - x).square().sum() / x.square().sum())

    one = error_of(1)
    assert error_of(4) == pytest.approx(one / 4, rel=0.06)
    assert error_of(16) == pytest.approx(one / 16, rel=0.08)


@pytest.mark.parametrize(("rounding", "bits"), [("stochastic", 4), ("eden", 2)])
def test_error_of_the_whole_exchange_is_the_sum_of_its_phases(rounding, bits):
    """Both phases on 4 ranks: the first error divided by 4, and the second, which no mean reduces."""
    codec, ranks = rotated(bits, rounding), 4
    parts = torch.randn(ranks, 65_536, generator=torch.Generator().manual_seed(1)) + 1.0
    mean = parts.mean(dim=0)
    messages = [codec.encode(part, MessageSeed(rank, 9)) for rank, part in enumerate(parts)]
    first = codec.decode_mean(messages, mean.numel())
    second = codec.decode(codec.encode(first, MessageSeed(0, 10)), mean.numel())
    single = relative_error(codec, parts[0])
    expected = single * float(parts.square().sum()) / ranks**2 + single * float(first.square().sum())
    assert float((second - mean).square().sum()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("rounding", ["stochastic", "eden"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bound_holds_in_buckets_of_any_size(rounding, bits):
    for size in (8, 64, 1024):
        codec = rotated(bits, rounding, size)
        for name, x in distributions(size).items():
            if name != "two spikes" or rounding == "stochastic":
                error = (draws(codec, x, 1, 8192 // size * 8) - x.double()).square().sum(dim=1).mean()
                assert error <= codec.variance_bound() * x.double().square().sum(), (name, size)


def test_two_equal_spikes_are_the_worst_case_of_one_bit():
    x = torch.zeros(65_536)
    x[::1024], x[5::1024] = 1.0, 1.0
    assert relative_error(rotated(1, "eden"), x) == pytest.approx(1.0, rel=1e-5)
    for bits in (2, 3, 4):
        codec = rotated(bits, "eden")
        assert relative_error(codec, x) <= codec.variance_bound()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_theory_of_the_normal_distribution(bits):
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(2))
    assert relative_error(rotated(bits, "eden"), x) == pytest.approx(nearest_error(bits), rel=0.02)
    codec = rotated(bits, "stochastic")
    expected = stochastic_error(codec.form.levels, median_largest(128))
    assert relative_error(codec, x) == pytest.approx(expected, rel=0.08)


def test_nearest_levels_are_those_of_lloyd_and_max():
    assert nearest_levels(1) == pytest.approx([math.sqrt(2 / math.pi)], abs=3e-4)
    assert nearest_levels(2) == pytest.approx([0.4528, 1.5104], abs=3e-4)
    assert nearest_levels(3) == pytest.approx([0.2451, 0.7560, 1.3439, 2.1520], abs=3e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_stochastic_levels_have_the_least_error(bits):
    levels, top = stochastic_levels(bits, 128), median_largest(128)
    least = stochastic_error(levels, top)
    for index in range(len(levels) - 1):
        for factor in (0.97, 1.03):
            moved = [level * factor if place == index else level for place, level in enumerate(levels)]
            assert stochastic_error(tuple(moved), top) > least


def test_a_bad_entry_makes_its_bucket_nan_and_no_other():
    x = distributions(512)["laplace"]
    x[5], x[140] = float("nan"), float("inf")
    for rounding in ("stochastic", "eden"):
        codec = rotated(2, rounding, 128)
        decoded = codec.decode_mean([codec.encode(x, 1), codec.encode(x, 2)], 512)
        assert decoded[:256].isnan().all()
        assert decoded[256:].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"bucket_size": 1000}, "bucket_size: got 1000, allowed is a power of two"),
        ({"bucket_size": 4}, "bucket_size"),
        ({"bits": 8}, "bits: got 8, allowed is 1 to 4"),
        ({"levels": "exponential"}, "levels: got 'exponential', allowed is 'gaussian'"),
        ({"norm": "linf"}, "norm"),
        ({"coding": "huffman"}, "coding"),
        ({"mantissa_bits": 1}, "mantissa_bits"),
        ({"rounding": "nearest"}, "rounding"),
        ({"rotation": "givens"}, "rotation"),
        ({"rotation": "none", "rounding": "eden"}, "rounding: got 'eden'"),
        ({"rotation": "none", "levels": "gaussian"}, "levels: got 'gaussian'"),
        ({"rotation": "none", "bits": 1}, "bits"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(arguments, name):
    for build in (NUQCodec, ExchangeConfig):
        with pytest.raises(ValueError, match=name) as found:
            build(**{"rotation": "hadamard", **arguments})
        assert "\n" not in str(found.value)


def test_named_codecs_and_malformed_messages():
    for name in ("nuqsgd_rotated", "nuqsgd_rotated_2bit", "nuqsgd_rotated_1bit"):
        codec = make_codec(name)
        assert CODECS[name]["levels"] == "gaussian"
        assert codec.form == RotatedFormat(codec.bits, 1024, "stochastic" if codec.bits == 4 else "eden")
        message = codec.encode(torch.ones(3000), 1)
        assert message.numel() == codec.nbytes(3000)
        with pytest.raises(ValueError, match="bytes for 3000"):
            codec.decode(message[:-1], 3000)
        message[11] |= 128
        with pytest.raises(ValueError, match="scale is negative"):
            codec.decode(message, 3000)
