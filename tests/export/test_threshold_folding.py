import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_n2uq.export.ir.steps import Affine, Clamp, PReLU
from lightning_n2uq.export.ir.thresholds import float_from_key, last_failing_float
from lightning_n2uq.export.lower.activations import activation_rule
from lightning_n2uq.export.lower.deferred import evaluate
from lightning_n2uq.export.lower.fold import fold_float, fold_integer
from lightning_n2uq.quantizers import LearnableThresholdQuantizer

NUMBERS = st.floats(-4, 4, width=32)
SLOPES = st.one_of(st.just(0.0), st.floats(0.0009765625, 2, width=32))
NEGATIVE = st.floats(-2, -0.0009765625, width=32)
THRESHOLDS = st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=7).map(sorted)


def affine(scale, shift):
    return Affine("", (), scale, shift)


def prelu(slope):
    return PReLU("", (), slope)


def clamp(low, high):
    return Clamp("", (), low, high)


@st.composite
def monotone_steps(draw, channels=3):
    """Batch norm of either sign (or none at all), bias, PReLU, clamp, bias."""

    def vector(numbers):
        return np.array(draw(st.lists(numbers, min_size=channels, max_size=channels)), np.float64)

    steps = [affine(vector(NUMBERS), vector(NUMBERS))]
    if draw(st.booleans()):
        steps.append(prelu(vector(SLOPES)))
    if draw(st.booleans()):
        steps.append(clamp(0.0, draw(st.sampled_from([6.0, float("inf")]))))
    if draw(st.booleans()):
        steps.append(affine(vector(NUMBERS), vector(NUMBERS)))
    return tuple(steps)


def codes_of(values, thresholds):
    return (values[..., None] > np.asarray(thresholds)).sum(-1)


@given(monotone_steps(), THRESHOLDS)
def test_integer_thresholds_give_the_codes_of_the_unfolded_map_everywhere(steps, thresholds):
    bound = np.array([40, 7, 0])
    table, sign = fold_integer(steps, np.array(thresholds), bound)
    for channel, limit in enumerate(bound):
        x = np.arange(-limit, limit + 1)
        expected = codes_of(evaluate(steps, np.tile(x.astype(np.float64), (3, 1)))[channel], thresholds)
        np.testing.assert_array_equal(codes_of(x * sign[channel], table[channel]), expected)
    assert (np.diff(table, axis=1) >= 0).all()


@given(monotone_steps(), THRESHOLDS)
def test_float_thresholds_are_exact_at_their_neighbours(steps, thresholds):
    table, sign = fold_float(steps, np.array(thresholds), 3)
    assert table.dtype == np.float32
    assert (table[:, 1:] >= table[:, :-1]).all()
    finite = np.clip(table, -np.finfo(np.float32).max, np.finfo(np.float32).max)
    random = np.random.default_rng(0).normal(0, 2, (3, 50))
    with np.errstate(over="ignore"):
        beside = [np.nextafter(finite, np.float32(end)) for end in (-np.inf, np.inf)]
    x = np.concatenate([finite, *beside, random, np.zeros((3, 1))], 1).astype(np.float32)
    x = np.where(np.isfinite(x), x, 0).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = codes_of(evaluate(steps, x.astype(np.float64) * sign[:, None]), thresholds)
    actual = (x[..., None] > table[:, None, :]).sum(-1)
    np.testing.assert_array_equal(actual, expected)


@given(st.lists(st.one_of(SLOPES, NEGATIVE), min_size=3, max_size=3), monotone_steps(), THRESHOLDS)
def test_slopes_of_either_sign_are_folded_exactly_or_refused(slopes, steps, thresholds):
    steps = (*steps, prelu(np.array(slopes, np.float64)))
    bound = np.full(3, 40)
    turning = sum(slope < 0 for slope in slopes)
    if turning:
        with pytest.raises(ValueError, match=f"{turning} of 3 channels are not monotone"):
            fold_integer(steps, np.array(thresholds), bound)
        with pytest.raises(ValueError, match=f"{turning} of 3 channels are not monotone"):
            fold_float(steps, np.array(thresholds), 3)
        return
    table, sign = fold_integer(steps, np.array(thresholds), bound)
    x = np.tile(np.arange(-40, 41), (3, 1))
    actual = (x[..., None] * sign[:, None, None] > table[:, None]).sum(-1)
    np.testing.assert_array_equal(actual, codes_of(evaluate(steps, x.astype(np.float64)), thresholds))


def test_infinities_count_as_beyond_every_finite_number():
    always, never = -100.0, 100.0
    relu = (affine(np.ones(1), np.zeros(1)), clamp(0.0, 6.0))
    table, _ = fold_float(relu, np.array([always, 3.0, never]), 1)
    assert table[0, 0] == -np.inf
    assert table[0, 2] == np.finfo(np.float32).max
    assert (np.float32([-np.inf, np.inf])[:, None] > table).sum(1).tolist() == [0, 3]


def test_equal_thresholds_stay_equal():
    steps = (affine(np.array([0.37]), np.array([0.1])),)
    table, _ = fold_integer(steps, np.array([1.0, 1.0, 1.0]), np.array([100]))
    assert table.tolist() == [[2, 2, 2]]


def test_a_decreasing_channel_is_compared_with_its_sign_turned():
    steps = (affine(np.array([-2.0]), np.array([1.0])),)
    table, sign = fold_integer(steps, np.array([0.0]), np.array([5]))
    assert sign.tolist() == [-1]
    assert [int(-x > table[0, 0]) for x in range(-5, 6)] == [int(1 - 2 * x > 0) for x in range(-5, 6)]


def test_a_map_that_turns_is_refused():
    with pytest.raises(ValueError, match="1 of 2 channels are not monotone"):
        fold_float((prelu(np.array([0.5, -0.5])),), np.array([0.0]), 2)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_keys_rank_floats_in_order(values):
    keys = np.array([-5, -1, 0, 1, 5, 2**30])
    floats = float_from_key(keys)
    assert (np.diff(floats) > 0).all()
    bits = np.abs(np.array(values, np.float32)).view(np.int32).astype(np.int64)
    np.testing.assert_array_equal(float_from_key(bits), np.abs(np.array(values, np.float32)))


@pytest.mark.parametrize("error", [0.0, 1e-3, 1e30, -np.inf, np.inf, np.nan])
def test_a_guess_changes_no_threshold(error):
    targets = np.array([[-3e38, -1.5, -1e-40, 0.0, 2e-45, 1.0, 7e20, 3.4e38]])

    def passes(x):
        with np.errstate(over="ignore"):
            return x.astype(np.float64) * 1.5 > targets

    expected = last_failing_float(passes, targets.shape)
    np.testing.assert_array_equal(last_failing_float(passes, targets.shape, targets / 1.5 + error), expected)


@pytest.mark.parametrize(("comparison", "codes"), [(">", [0, 0, 1, 2]), (">=", [0, 1, 2, 3])])
def test_an_input_at_a_threshold_gets_the_code_that_the_quantizer_gives_it(comparison, codes):
    quantizer = LearnableThresholdQuantizer(2).eval()
    quantizer.comparison = comparison
    with torch.no_grad():
        quantizer.widths.fill_(0.5)  # thresholds 0.25, 0.75, 1.25
    x = torch.tensor([0.0, 0.25, 0.75, 1.25])
    assert quantizer.codes(x).tolist() == codes
    rule = activation_rule(quantizer, "q")
    table, sign = fold_float((Affine("", (), np.array([rule.scale_in]), np.zeros(1)),), rule.thresholds, 1)
    assert ((x.numpy() * sign[0])[:, None] > table[0]).sum(1).tolist() == codes
