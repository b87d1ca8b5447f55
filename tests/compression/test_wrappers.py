"""Identity, skipping, error feedback, warm-up, names and seeds."""

import pytest
import torch
from codec_cases import laplace

from lightning_n2uq.compression import (
    CODECS,
    ErrorFeedback,
    IdentityCodec,
    NUQCodec,
    SkipCodec,
    codec_at_step,
    make_codec,
    mix_seed,
)


def test_identity_is_exact_for_every_bit_pattern():
    x = torch.randint(-(2**31), 2**31 - 1, (1000,), generator=torch.Generator().manual_seed(0)).int()
    codec = IdentityCodec()
    payload = codec.encode(x.view(torch.float32), seed=0)
    assert payload.numel() == codec.nbytes(1000) == 4000
    assert torch.equal(codec.decode(payload, 1000).view(torch.int32), x)
    assert codec.variance_bound() == 0.0


def test_identity_mean_is_the_sum_in_order_divided():
    a, b, c = laplace(10, 1), laplace(10, 2), laplace(10, 3)
    codec = IdentityCodec()
    mean = codec.decode_mean([codec.encode(x, 0) for x in (a, b, c)], 10)
    assert torch.equal(mean, (a + b + c) / 3)


@pytest.mark.parametrize("inner", [NUQCodec(bucket_size=64), NUQCodec(coding="huffman")], ids=repr)
@pytest.mark.parametrize(
    "segments", [[(0, 5)], [(995, 5)], [(100, 3), (3, 50), (53, 7)], [], [(0, 1000)]], ids=str
)
def test_skipped_segments_are_exact_and_the_rest_is_the_inner_codec(inner, segments):
    codec, x = SkipCodec(inner, segments), laplace(1000)
    exact = torch.zeros(1000, dtype=torch.bool)
    for offset, numel in segments:
        exact[offset : offset + numel] = True
    payload = codec.encode(x, seed=9)
    decoded = codec.decode(payload, 1000)
    rest = x[~exact]
    assert torch.equal(decoded[exact], x[exact])
    assert torch.equal(decoded[~exact], inner.decode(inner.encode(rest, seed=9), rest.numel()))
    assert payload.numel() <= codec.nbytes(1000) == 4 * int(exact.sum()) + inner.nbytes(rest.numel())
    assert torch.equal(codec.decode_mean([payload, payload], 1000), decoded)


@pytest.mark.parametrize("segments", [[(0, 5), (4, 2)], [(-1, 3)], [(3, -1)]], ids=str)
def test_bad_segments_are_refused(segments):
    with pytest.raises(ValueError, match="segments"):
        SkipCodec(NUQCodec(), segments)


def test_gradient_shorter_than_the_segments_is_refused():
    with pytest.raises(ValueError, match="numel"):
        SkipCodec(NUQCodec(), [(90, 20)]).encode(laplace(100), 0)


def test_error_feedback_sends_everything_in_the_long_run():
    """The sum of what was sent differs from the sum of the gradients by one residual only."""
    codec, feedback = NUQCodec(bits=4, bucket_size=64), ErrorFeedback()
    sent, total = torch.zeros(640), torch.zeros(640)
    for step in range(30):
        x = laplace(640, seed=step)
        sent += codec.decode(feedback.encode(codec, "w", x, seed=step), 640)
        total += x
    residual = feedback.residuals["w"]
    torch.testing.assert_close(sent + residual, total, rtol=1e-4, atol=1e-4)
    assert residual.norm() < 0.2 * total.norm()


def test_error_feedback_survives_non_finite_gradients():
    codec, feedback = NUQCodec(bucket_size=8), ErrorFeedback()
    feedback.encode(codec, 0, laplace(24), seed=0)
    before = feedback.residuals[0].clone()
    bad = laplace(24, seed=1)
    bad[9] = float("nan")
    assert codec.decode(feedback.encode(codec, 0, bad, seed=1), 24)[8:16].isnan().all()
    after = feedback.residuals[0]
    assert after.isfinite().all()
    assert torch.equal(after[8:16], before[8:16])
    assert not torch.equal(after[:8], before[:8])
    assert codec.decode(feedback.encode(codec, 0, laplace(24), seed=2), 24).isfinite().all()


def test_error_feedback_does_not_touch_the_gradient_and_checks_sizes():
    feedback, x = ErrorFeedback(), laplace(100)
    feedback.encode(NUQCodec(), "w", x, seed=0)
    feedback.encode(NUQCodec(), "w", x, seed=1)
    assert torch.equal(x, laplace(100))
    with pytest.raises(ValueError, match="residual"):
        feedback.encode(NUQCodec(), "w", laplace(99), seed=0)


def test_warm_up_ends_at_the_given_step():
    codec = NUQCodec()
    assert [codec_at_step(codec, step, 2) is codec for step in range(4)] == [False, False, True, True]
    assert isinstance(codec_at_step(codec, 1, 2), IdentityCodec)


@pytest.mark.parametrize("name", ["identity", *CODECS])
def test_named_codecs(name):
    codec = make_codec(name)
    x = laplace(2000)
    assert codec.decode(codec.encode(x, 0), 2000).isfinite().all()


def test_names_and_their_arguments():
    assert make_codec("nuqsgd", bucket_size=64).describe() == NUQCodec(bits=4, bucket_size=64).describe()
    assert make_codec("nuqsgd_2bit").bits == 2
    with pytest.raises(ValueError, match="name must be"):
        make_codec("zip")
    with pytest.raises(ValueError, match="identity takes no"):
        make_codec("identity", bits=2)


def test_descriptions_differ_wherever_bytes_do():
    codecs = [
        NUQCodec(),
        NUQCodec(bits=2),
        NUQCodec(bucket_size=512),
        NUQCodec(norm="linf"),
        NUQCodec(levels="uniform"),
        NUQCodec(levels="float", mantissa_bits=1),
        NUQCodec(bits=3, levels=[0, 0.2, 0.5, 1]),
        NUQCodec(bits=3, levels=[0, 0.3, 0.5, 1]),
        NUQCodec(coding="huffman"),
        IdentityCodec(),
        SkipCodec(NUQCodec(), [(0, 3)]),
    ]
    assert len({codec.describe() for codec in codecs}) == len(codecs)
    assert NUQCodec().describe() == NUQCodec(bits=4, levels="exponential").describe()


def test_seeds_differ_by_run_rank_step_and_tensor():
    seeds = {mix_seed(b, r, s, t) for b in range(6) for r in range(6) for s in range(6) for t in range(6)}
    assert len(seeds) == 6**4
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert mix_seed(1, 2, 3, 4) == mix_seed(1, 2, 3, 4)
