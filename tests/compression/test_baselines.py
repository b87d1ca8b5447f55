"""Codecs of other papers: error, bias, bounds, sizes, special values, refusals."""

import math

import pytest
import torch
from codec_cases import laplace

from lightning_n2uq.compression import (
    AdaptiveCodec,
    Codec,
    ErrorFeedback,
    NaturalCodec,
    SignCodec,
    TernGradCodec,
    TopKCodec,
    make_codec,
)
from lightning_n2uq.compression.magnitudes import BINS, Magnitudes, magnitude_histogram
from lightning_n2uq.distributed import ExchangeConfig
from lightning_n2uq.distributed.sharded.settings import check_settings

NAMES = ("alq", "amq", "terngrad", "natural", "signsgd", "topk")
NUMEL = 5003


def error(codec: Codec, x: torch.Tensor, seed: int = 1) -> float:
    return float((codec.decode(codec.encode(x, seed), x.numel()) - x).square().sum() / x.square().sum())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("numel", [0, 1, 7, 1024, NUMEL])
def test_messages_have_the_bytes_they_say(name, numel):
    codec, x = make_codec(name), laplace(NUMEL)[:numel]
    storage = torch.zeros(codec.nbytes(numel) + 5, dtype=torch.uint8)
    message = codec.encode(x, 3, out=storage[4:])
    assert codec.fixed_size
    assert message.numel() == codec.nbytes(numel)
    decoded = codec.decode(message, numel)
    assert torch.equal(codec.decode(codec.encode(x, 3), numel), decoded)
    if numel:
        assert error(codec, x) <= codec.variance_bound()
        with pytest.raises(ValueError, match="payload must have"):
            codec.decode(message[:-1], numel)
    mean = codec.decode_mean([message, codec.encode(2 * x, 4)], numel)
    expected = (decoded + codec.decode(codec.encode(2 * x, 4), numel)) / 2
    assert torch.equal(mean, expected)


@pytest.mark.parametrize("name", NAMES)
def test_bad_entries_are_not_hidden(name):
    for bad in (float("nan"), float("inf")):
        x = laplace(NUMEL)
        x[70] = bad
        codec = make_codec(name)
        assert not codec.decode(codec.encode(x, 1), NUMEL)[70].isfinite()


UNBIASED = [NaturalCodec(), AdaptiveCodec(norm="linf"), AdaptiveCodec(norm="linf", family="amq")]


@pytest.mark.parametrize("codec", UNBIASED, ids=lambda codec: codec.describe()[:7])
@pytest.mark.parametrize("magnitude", [1e-35, 1.0, 1e35])
def test_unbiased_over_2000_draws(codec, magnitude):
    if isinstance(codec, AdaptiveCodec):
        codec.adapt(codec.observe(laplace(4096)))
    x = laplace(1024) * magnitude
    draws = codec.decode(codec.encode(x.repeat(2000), 5), 2000 * 1024).view(2000, -1).double() / magnitude
    spread = draws.std(dim=0) / math.sqrt(2000)
    off = (draws.mean(dim=0) - x.double() / magnitude).abs()
    assert (off > 4 * spread + 1e-6).sum() <= 2
    assert (off <= 8 * spread + 0.02).all()  # rare events are not normal


def test_natural_compression_rounds_to_the_powers_of_two_around_a_number():
    x = torch.tensor([3.0, -5.0, 0.0, 2.0**-130, 1.0, -0.75]).repeat(4000)
    decoded = NaturalCodec().decode(NaturalCodec().encode(x, 1), x.numel()).view(4000, 6)
    seen = [sorted(set(column.tolist())) for column in decoded.T]
    assert seen == [[2.0, 4.0], [-8.0, -4.0], [0.0], [0.0, 2.0**-126], [1.0], [-1.0, -0.5]]
    assert error(NaturalCodec(), laplace(1 << 16)) == pytest.approx(1 / 12, rel=0.05)


def test_sign_codec_sends_mean_magnitudes():
    x = torch.tensor([1.0, -3.0, 2.0, -2.0, 4.0, 0.0, -1.0, 3.0, -6.0])
    decoded = SignCodec(8).decode(SignCodec(8).encode(x, 0), 9)
    assert decoded.tolist() == [2.0, -2.0, 2.0, -2.0, 2.0, 2.0, -2.0, 2.0, -6.0]


def test_topk_sends_the_largest_exactly():
    x = laplace(1000)
    decoded = TopKCodec(0.05).decode(TopKCodec(0.05).encode(x, 0), 1000)
    kept = x.abs() >= x.abs().sort().values[-50]
    assert torch.equal(decoded, torch.where(kept, x, 0.0))
    message = TopKCodec(0.05).encode(x, 0)
    message[3] = 255
    with pytest.raises(ValueError, match="a place is outside"):
        TopKCodec(0.05).decode(message, 1000)


def test_terngrad_clips_no_bucket_of_equal_values():
    """Their standard deviation is 0, and so would the clipped values be."""
    codec = TernGradCodec(bucket_size=64)
    x = torch.cat([torch.full((64,), 0.25), torch.zeros(64)])
    assert torch.equal(codec.decode(codec.encode(x, 0), 128), x)


def test_terngrad_clips_and_has_three_levels():
    x = torch.cat([laplace(1024), torch.zeros(1024)])
    decoded = TernGradCodec().decode(TernGradCodec().encode(x, 0), 2048)
    reach = 2.5 * x[:1024].std(correction=0)
    assert decoded[:1024].abs().unique().tolist() == pytest.approx([0.0, float(reach)])
    assert not decoded[1024:].any()
    assert error(TernGradCodec(), laplace(1 << 16)) < 1.0  # without clipping 2.5


@pytest.mark.parametrize("codec", [SignCodec(64), TopKCodec(0.02)], ids=repr)
def test_error_feedback_makes_biased_codecs_follow_the_sum(codec):
    feedback, total, sent = ErrorFeedback(), torch.zeros(256), torch.zeros(256)
    for step in range(300):
        gradient = laplace(256, seed=step) + 1.0
        total += gradient
        sent += codec.decode(feedback.encode(codec, "w", gradient, step), 256)
    assert (sent - total).norm() / total.norm() < 0.15


@pytest.mark.parametrize(("family", "bits", "norm"), [
    ("alq", 3, "l2"), ("alq", 4, "l2"), ("alq", 4, "linf"), ("amq", 3, "l2"), ("amq", 4, "linf"),
])  # fmt: skip
def test_adapted_levels_have_a_smaller_error(family, bits, norm):
    codec, x = AdaptiveCodec(bits, norm=norm, family=family), laplace(1 << 16)
    before, bytes_ = error(codec, x), codec.nbytes(NUMEL)
    counts = codec.observe(x)
    codec.adapt(counts)
    seen = Magnitudes(counts / counts.sum())
    after = error(codec, x)
    assert after < 0.99 * before
    assert codec.nbytes(NUMEL) == bytes_
    if norm == "l2":
        drawn = sum(error(codec, x, seed) for seed in range(12)) / 12
        assert drawn == pytest.approx(seen.variance(list(codec.levels)) * 1024, rel=0.05)
    if family == "alq":  # no level can be moved to advantage
        for index in range(1, len(codec.levels) - 1):
            for factor in (0.97, 1.03):
                moved = [level * factor if k == index else level for k, level in enumerate(codec.levels)]
                assert seen.variance(moved) >= seen.variance(list(codec.levels)) * (1 - 1e-6)


def test_levels_stay_where_nothing_was_seen():
    codec = AdaptiveCodec(4)
    before = codec.levels
    for counts in (torch.zeros(BINS), torch.full((BINS,), float("nan")), codec.observe(torch.zeros(4096))):
        codec.adapt(counts.double())
        assert codec.levels == before
    codec.adapt(codec.observe(torch.ones(4096)))  # one magnitude alone: levels stay apart
    assert len(set(codec.levels)) == 8


def test_histogram_holds_every_coordinate_once():
    x = laplace(8192)
    x[:1024] = float("nan")
    counts = magnitude_histogram(x, 1024, "l2")
    assert float(counts.sum()) == pytest.approx(1024 * float(x[1024:].double().square().sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"method": "dgc"}, "method: got 'dgc'"),
        ({"method": "natural", "bits": 2}, "bits: got 2, allowed is 4"),
        ({"method": "terngrad", "rotation": "hadamard"}, "rotation"),
        ({"method": "alq", "levels": "uniform"}, "levels"),
        ({"method": "alq", "bits": 2}, "bits"),
        ({"method": "alq", "adapt_every": 0}, "adapt_every"),
        ({"adapt_every": 10}, "adapt_every"),
        ({"density": 0.1}, "density"),
        ({"method": "topk", "error_feedback": True, "density": 0.0}, "density"),
        ({"method": "topk"}, "error_feedback: got False, allowed is true with method='topk'"),
        ({"method": "signsgd"}, "error_feedback"),
        ({"method": "signsgd", "error_feedback": True, "second_phase_bits": 4}, "second_phase_bits"),
        ({"method": "terngrad", "error_feedback": True}, "error_feedback: needs"),
    ],
)
def test_settings_that_would_be_ignored_are_refused_in_one_line(settings, name):
    with pytest.raises(ValueError, match=name) as found:
        ExchangeConfig(**settings)
    assert "\n" not in str(found.value)


def test_adaptive_levels_are_refused_in_sharded_training():
    with pytest.raises(ValueError, match="method: got 'alq', allowed in sharded training"):
        check_settings(ExchangeConfig(method="alq"), None)
