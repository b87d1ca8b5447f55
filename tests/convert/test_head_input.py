"""The quantizer of one operand of attention's products: a range for every head, found from data or a look."""

import pytest
import torch

from lightning_n2uq.convert.head_input import HeadInput
from lightning_n2uq.quantizers import LSQ, activation_quantizer
from lightning_n2uq.quantizers.looks import looking
from lightning_n2uq.quantizers.positions import level_position
from lightning_n2uq.quantizers.ranges import best_range, best_symmetric_range, full_range, quantize_uniformly

METHODS = ("n2uq", "lsq", "lsq_signed", "lsq_plus", "ewgs", "dorefa")


def heads(*factors):
    """Returns `[4, heads, 6, 5]`, each head of its own size."""
    x = torch.randn(4, len(factors), 6, 5, generator=torch.Generator().manual_seed(0))
    return x * torch.tensor(factors).view(-1, 1, 1)


def test_each_head_has_its_own_range():
    torch.manual_seed(0)
    x = torch.randn(8, 3, 10, 16) * torch.tensor([0.1, 1.0, 30.0]).view(3, 1, 1) + torch.tensor(
        [0.0, 0.5, -30.0]
    ).view(3, 1, 1)
    quantizer = HeadInput(activation_quantizer("n2uq", 4), 3)
    y = quantizer(x).detach()
    assert quantizer.fitted
    noise = ((y - x).square().mean((0, 2, 3)) / x.var((0, 2, 3))).sqrt()
    assert float(noise.max()) < 0.2
    assert quantizer.codes(x).amin((0, 2, 3)).tolist() == [0, 0, 0]
    assert quantizer.codes(x).amax((0, 2, 3)).tolist() == [15, 15, 15]
    joint = HeadInput(activation_quantizer("n2uq", 4), 1)
    assert float(((joint(x).detach() - x).square().mean((0, 2, 3)) / x.var((0, 2, 3))).sqrt()[0]) > 0.5


@pytest.mark.parametrize("shape", [(2, 4, 5, 8), (5, 8), (2, 3, 5, 8)])
def test_operands_of_another_number_of_heads_are_refused_in_one_line(shape):
    quantizer = HeadInput(activation_quantizer("lsq", 4), 3)
    if shape == (2, 3, 5, 8):
        assert quantizer(torch.randn(shape)).shape == shape
        return
    with pytest.raises(ValueError, match=r"got an operand .*, allowed are \[..., 3, L, E\]"):
        quantizer(torch.randn(shape))


def test_gradients_of_scale_and_offset_are_lsq_s_and_lsq_plus_s():
    torch.manual_seed(0)
    quantizer = HeadInput(LSQ(3), 2)
    x = torch.randn(4, 2, 3, 5)
    quantizer(x)
    x = 1.1 * torch.randn_like(x)  # no value at an end of the range
    weight = torch.randn_like(x)
    (quantizer(x) * weight).sum().backward()
    u = quantizer.method_input(x).detach()
    step, high = float(quantizer.method.step.detach()), 7
    inside = ((u / step >= 0) & (u / step <= high)).float()
    levels = (u / step).clamp(0, high).round() * step
    per_head = ((levels - inside * u) * weight).sum((0, 2, 3))
    torch.testing.assert_close(quantizer.scale.grad, per_head, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        quantizer.offset.grad, ((1 - inside) * weight).sum((0, 2, 3)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("search", [best_range, best_symmetric_range])
@pytest.mark.parametrize("levels", [3, 4, 16])
def test_ranges_searched_together_are_those_searched_one_by_one(search, levels):
    rows = heads(0.1, 1.0, 30.0).movedim(1, 0).flatten(1)
    rows = torch.cat([rows, rows.abs(), rows[:1] * 0, -rows.abs()])
    together = search(rows, levels)
    alone = [search(row, levels) for row in rows]
    for end, singles in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(end, torch.stack(singles))
    low, high = together
    assert (low <= 0).all()
    assert (high >= 0).all()
    assert (low < high).all()


def error_of(x, low, high, levels):
    return float((quantize_uniformly(x, low, high, levels) - x).square().mean())


def shares(end):
    return [end * (i / 24) for i in range(24, 0, -1)]


@pytest.mark.parametrize("levels", [3, 4, 16, 256])
def test_the_range_is_that_of_a_plain_loop_over_the_same_candidates(levels):
    x = heads(1.0).flatten().double()
    low, high = full_range(x)
    for _ in range(2):
        high = min(shares(high), key=lambda end: error_of(x, low, end, levels))
        low = min(shares(low), key=lambda end: error_of(x, end, high, levels))
    assert best_range(x, levels) == (low, high)
    assert error_of(x, low, high, levels) <= error_of(x, *full_range(x), levels)


@pytest.mark.parametrize("levels", [4, 16, 256])
def test_the_symmetric_range_is_that_of_a_plain_loop_over_the_same_candidates(levels):
    x, half = heads(1.0).flatten().double(), levels // 2
    steps = shares(torch.maximum(-x.min() / half, x.max() / (half - 1)))
    step = min(steps, key=lambda s: error_of(x, -half * s, (half - 1) * s, levels))
    assert best_symmetric_range(x, levels) == (-half * step, (half - 1) * step)


def test_a_look_searches_nothing_and_evaluation_does(monkeypatch):
    searched = []
    quantizer = HeadInput(activation_quantizer("n2uq", 4), 2)
    original = quantizer.range_of
    monkeypatch.setattr(quantizer, "range_of", lambda sample: searched.append(0) or original(sample))
    x = heads(1.0, 9.0)
    for mode in (True, False):
        with looking():
            y = quantizer.train(mode)(x).detach()
        assert not searched
        assert not quantizer.fitted
        torch.testing.assert_close(y.amax((0, 2, 3)), x.amax((0, 2, 3)))
    quantizer(x)
    assert searched
    assert not quantizer.fitted


@pytest.mark.parametrize("method", METHODS)
def test_codes_and_positions_belong_to_the_levels_before_and_after_fitting(method):
    quantizer, x = HeadInput(activation_quantizer(method, 3), 2).eval(), heads(0.2, 5.0)
    for fitted in (False, True):
        if fitted:
            quantizer.train()(x)
            quantizer.eval()
        assert quantizer.fitted is fitted
        codes, y = quantizer.codes(x), quantizer(x).detach()
        assert (codes.double() - level_position(quantizer, x)).abs().max() <= 0.5 + 1e-6
        for head in range(2):
            found = [y[:, head][codes[:, head] == code] for code in codes[:, head].unique()]
            torch.testing.assert_close(torch.cat([v - v[0] for v in found]), torch.zeros(x[:, 0].numel()))
            assert len(found) > 4


def test_an_empty_batch_puts_the_fit_off():
    quantizer, twin = (HeadInput(activation_quantizer("n2uq", 4), 2) for _ in range(2))
    with pytest.warns(UserWarning, match="the batch has no spread"):
        y = quantizer(torch.zeros(0, 2, 6, 5))
    assert y.shape == (0, 2, 6, 5)
    assert not quantizer.fitted
    x = heads(1.0, 2.0)
    assert torch.equal(quantizer(x), twin(x))
    assert quantizer.fitted
