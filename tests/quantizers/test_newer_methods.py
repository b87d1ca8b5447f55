"""nuLSQ, LCQ, EWGS, StatsQ, SEQ, ternary, binary, least-error weights: levels, gradients by other means."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_n2uq.ops.ste import round_ste
from lightning_n2uq.quantizers import (
    EWGS,
    LCQ,
    SEQ,
    BinaryWeight,
    EWGSWeight,
    LCQWeight,
    NuLSQ,
    SEQTernary,
    StatsQ,
    TernaryWeight,
    activation_quantizer,
    quantizer_parameters,
    weight_quantizer,
)
from lightning_n2uq.quantizers.base import STEP_FLOOR

WEIGHTS = {
    "nulsq": 3,
    "lcq": 3,
    "ewgs": 3,
    "statsq": 3,
    "least_error": 3,
    "seq": 3,
    "seq_ternary": 2,
    "ternary": 2,
    "binary": 1,
}
ACTIVATIONS = {"nulsq": 3, "lcq": 3, "ewgs": 3}
EVERY = [(activation_quantizer, *item) for item in ACTIVATIONS.items()]
EVERY += [(weight_quantizer, *item) for item in WEIGHTS.items()]
INTEGER = [name for name in WEIGHTS if name not in ("nulsq", "lcq")]


def grads_of(module: nn.Module, x: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of the weighted sum of `module(x)`."""
    x = x.clone().requires_grad_()
    (module(x) * weights).sum().backward()
    return x.grad, {name: p.grad for name, p in module.named_parameters()}


def fitted(module: nn.Module, **values: Tensor | list[float]) -> nn.Module:
    """The module in float64, its parameters set."""
    module.double()
    with torch.no_grad():
        for name, value in values.items():
            module.get_parameter(name).copy_(torch.as_tensor(value))
        if hasattr(module, "initialized"):
            module.initialized.fill_(True)
    return module


# nuLSQ


@pytest.mark.parametrize("signed", [False, True])
def test_nulsq_levels_are_sums_of_steps_outwards_from_zero(signed: bool) -> None:
    quantizer = fitted(NuLSQ(2, signed), steps=[0.5, 1.0, 2.0])
    levels = [-1.5, -0.5, 0.0, 2.0] if signed else [0.0, 0.5, 1.5, 3.5]
    assert quantizer.levels().tolist() == levels
    middles = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
    assert quantizer(torch.tensor(middles)).tolist() == levels[:-1]  # a tie goes to the lower level
    assert quantizer(torch.tensor([-9.0, 9.0, math.inf, -math.inf])).tolist() == [
        levels[i] for i in (0, -1, -1, 0)
    ]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_nulsq_gradients_are_those_of_a_sum_of_clipped_ramps(signed: bool, bits: int) -> None:
    torch.manual_seed(bits)
    steps = torch.rand(2**bits - 1, dtype=torch.float64) + 0.2
    x, weights = torch.randn(2, 400, dtype=torch.float64).unbind(0)
    x = x * (2**bits)
    below = 2 ** (bits - 1) if signed else 0
    high = 2**bits - 1 - below

    def ramps(v: Tensor, sizes: Tensor) -> Tensor:
        starts = sizes.cumsum(0) - sizes
        return sum(s * round_ste(((v - c) / s).clamp(0, 1)) for s, c in zip(sizes, starts, strict=True))

    free, s = x.clone().requires_grad_(), steps.clone().requires_grad_()
    y = ramps(free, s[below:])
    y = torch.where(free < 0, -ramps(-free, s[:below]), y) if signed else y
    expected = torch.autograd.grad((y * weights).sum(), [free, s])
    quantizer = fitted(NuLSQ(bits, signed), steps=steps)
    torch.testing.assert_close(quantizer(x), y)
    grad_x, grads = grads_of(quantizer, x, weights)
    torch.testing.assert_close(grad_x, expected[0])
    torch.testing.assert_close(grads["steps"], expected[1] / math.sqrt(x.numel() * high))


def test_nulsq_starts_as_lsq() -> None:
    x = torch.rand(500)
    quantizer, lsq = NuLSQ(3), activation_quantizer("lsq", 3)
    torch.testing.assert_close(quantizer(x), lsq(x), rtol=1e-5, atol=1e-6)


# LCQ


def companding(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Knots and values of the companding function, for `numpy.interp`."""
    heights = np.exp(theta) / np.exp(theta).sum()
    return np.linspace(0, 1, len(theta) + 1), np.concatenate([[0], heights.cumsum()])


@pytest.mark.parametrize(("kind", "steps"), [(LCQ, 7), (LCQWeight, 3)])
def test_lcq_values_and_levels_follow_the_companding_function(kind: type, steps: int) -> None:
    rng = np.random.default_rng(0)
    theta, x = rng.normal(size=16), rng.normal(size=(4, 50)) * 2
    quantizer = fitted(kind(3), theta=torch.tensor(theta), clip=[1.7])
    deviation = x.std() if kind is LCQWeight else 1.0
    low = -1 if kind is LCQWeight else 0
    knots, values = companding(theta)
    unit = np.clip(x / deviation / 1.7, low, 1)
    place = np.rint(np.interp(np.abs(unit), knots, values) * steps) / steps
    expected = np.sign(unit) * np.interp(place, values, knots) * 1.7 * deviation
    np.testing.assert_allclose(quantizer(torch.tensor(x)).detach(), expected, atol=1e-12)
    assert quantizer.num_levels == len(quantizer.levels())
    found = quantizer.levels()[quantizer.codes(torch.tensor(x)).long()] * deviation
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_lcq_starts_uniform() -> None:
    x = torch.randn(300)
    assert torch.allclose(LCQ(3, 2.0)(x), (x.clamp(0, 2) / 2 * 7).round() / 7 * 2, atol=1e-6)


@pytest.mark.parametrize("kind", [LCQ, LCQWeight])
def test_lcq_theta_gradient_is_that_of_differences_straight_through_the_rounding(kind: type) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(2, 5, 60, dtype=torch.float64).unbind(0)
    theta = torch.randn(16, dtype=torch.float64)
    quantizer = fitted(kind(3), theta=theta, clip=[1.5])
    grad_x, grads = grads_of(quantizer, x, weights)
    deviation = x.std(correction=0).item() if kind is LCQWeight else 1.0
    unit = (x / deviation / 1.5).clamp(quantizer.lowest, 1).numpy()
    size, sign, steps = np.abs(unit), np.sign(unit), quantizer.steps
    knots, values = companding(theta.numpy())
    place = np.rint(np.interp(size, knots, values) * steps) / steps
    slope = (np.diff(values) / np.diff(knots))[(np.searchsorted(values, place, "right") - 1).clip(0, 15)]

    def loss(t: np.ndarray) -> float:
        k, v = companding(t)
        level = np.interp(place, v, k) + (np.interp(size, k, v) - np.interp(size, knots, values)) / slope
        return float((weights.numpy() * sign * (size < 1) * level).sum() * 1.5 * deviation)

    for i in range(16):
        step = np.zeros(16)
        step[i] = 1e-6
        expected = (loss(theta.numpy() + step) - loss(theta.numpy() - step)) / 2e-6
        assert grads["theta"][i].item() == pytest.approx(expected, abs=1e-6)
    inside = (x / deviation).abs() < 1.5 if kind is LCQWeight else (x > 0) & (x < 1.5)
    torch.testing.assert_close(grad_x, torch.where(inside, weights, 0))
    value = quantizer(x).detach() / 1.5 - torch.where(inside, x, 0) / 1.5
    assert grads["clip"].item() == pytest.approx((weights * value).sum().item())


# EWGS


def test_ewgs_values_and_scaled_gradients() -> None:
    quantizer = fitted(EWGS(2, delta=0.5), lower=[-1.0], upper=[2.0])
    x = torch.tensor([-5.0, -0.7, 0.2, 1.4, 7.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, -3.0, 0.5, 1.0], dtype=torch.float64)
    unit = ((x + 1) / 3).clamp(0, 1)
    level = (unit * 3).round() / 3
    torch.testing.assert_close(quantizer(x), level)
    grad_x, grads = grads_of(quantizer, x, weights)
    through = weights * (1 + 0.5 * weights.sign() * (unit - level))
    inside = (unit > 0) & (unit < 1)
    torch.testing.assert_close(grad_x, torch.where(inside, through / 3, 0))
    torch.testing.assert_close(grads["upper"], (-(x + 1) / 9 * through)[inside].sum().reshape(1))
    torch.testing.assert_close(grads["lower"], ((x - 2) / 9 * through)[inside].sum().reshape(1))


def test_ewgs_weights_are_odd_multiples_with_a_learned_scale() -> None:
    quantizer = fitted(EWGSWeight(2), lower=[-1.0], upper=[1.0], scale=[0.6])
    w = torch.tensor([[-2.0, -0.5, 0.1, 0.9]], dtype=torch.float64)
    torch.testing.assert_close(quantizer(w), torch.tensor([[-0.6, -0.2, 0.2, 0.6]], dtype=torch.float64))
    _, grads = grads_of(quantizer, w, torch.ones_like(w))
    assert grads["scale"].item() == pytest.approx(0.0)
    first = EWGSWeight(3)
    weight = torch.randn(40, 50)
    assert first(weight).abs().mean().item() == pytest.approx(weight.abs().mean().item(), rel=1e-4)


def test_ewgs_without_scaling_is_straight_through() -> None:
    with pytest.raises(ValueError, match="delta: got -1"):
        EWGS(2, delta=-1)
    quantizer = fitted(EWGS(2, delta=0.0), lower=[0.0], upper=[1.0])
    x = torch.rand(50, dtype=torch.float64)
    assert torch.equal(grads_of(quantizer, x, torch.ones_like(x))[0], torch.ones_like(x))


# Statistics and learned scales of weights


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_statsq_is_the_papers_formula_per_channel(bits: int) -> None:
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    scale = 2 * weight.abs().mean((1, 2, 3), keepdim=True)
    half = 2 ** (bits - 1)
    clipped = (weight / scale).clamp(-1, 1 - 1e-9)
    expected = scale * ((clipped * half - 0.5).round() + 0.5) / half
    quantizer = StatsQ(bits)
    torch.testing.assert_close(quantizer(weight), expected)
    assert len((quantizer(weight)[0] / scale[0]).unique()) <= 2**bits
    upstream = torch.randn_like(weight)
    assert torch.equal(grads_of(quantizer, weight, upstream)[0], upstream)


@pytest.mark.parametrize(
    ("kind", "levels"), [(SEQ, [-0.75, -0.25, 0.25, 0.75]), (SEQTernary, [-2 / 3, 0, 2 / 3])]
)
def test_seq_levels_and_gradients(kind: type, levels: list[float]) -> None:
    torch.manual_seed(0)
    quantizer = kind(2)
    quantizer.set_channels(3)
    fitted(quantizer, alpha=[0.5, 1.0, 2.0])
    weight, upstream = torch.randn(2, 3, 40, dtype=torch.float64).unbind(0)
    alpha = torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64)
    unit = weight / alpha
    levels = torch.tensor(levels, dtype=torch.float64)
    nearest = levels[(unit.clamp(-0.99, 0.99)[..., None] - levels).abs().argmin(-1)]
    torch.testing.assert_close(quantizer(weight), nearest * alpha)
    grad, grads = grads_of(quantizer, weight, upstream)
    inside = unit.abs() <= 0.99
    torch.testing.assert_close(grad, torch.where(inside, upstream, 0))
    expected = (upstream * (nearest - torch.where(inside, unit, 0))).sum(1) / math.sqrt(weight.numel())
    torch.testing.assert_close(grads["alpha"], expected)


def test_seq_starts_at_the_largest_magnitude_of_every_channel() -> None:
    weight = torch.randn(6, 5, 3, 3)
    layer = weight_quantizer("seq", 2, channels=6)
    layer(weight)
    assert torch.equal(layer.alpha, weight.abs().amax((1, 2, 3)))
    whole = weight_quantizer("seq", 2)
    whole(weight)
    assert torch.equal(whole.alpha, weight.abs().max().reshape(1))


def test_ternary_and_binary_values_and_gradients() -> None:
    weight = torch.tensor([[-2.0, -0.5, 0.1, 1.4], [0.0, 0.0, 0.0, 3.0]])
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    ternary = TernaryWeight()
    torch.testing.assert_close(ternary(weight), torch.tensor([[-1.7, 0, 0, 1.7], [0, 0, 0, 3.0]]))
    assert torch.equal(grads_of(ternary, weight, upstream)[0], upstream)
    binary = BinaryWeight()
    torch.testing.assert_close(binary(weight), torch.tensor([[-1.0, -1, 1, 1], [0.75, 0.75, 0.75, 0.75]]))
    assert grads_of(binary, weight, upstream)[0].tolist() == [[0, 2, 3, 0], [5, 6, 7, 0]]


# All of them


@pytest.mark.parametrize(("build", "name", "bits"), EVERY)
def test_zeros_nan_and_infinity(build: object, name: str, bits: int) -> None:
    quantizer = build(name, bits)
    zeros = torch.zeros(3, 8)
    assert quantizer.eval()(zeros).abs().max() < 1e-6  # before any data
    quantizer.train()(torch.randn(3, 8))
    assert torch.isfinite(quantizer(zeros)).all()
    x = torch.randn(3, 8)
    x[1, 2] = math.nan
    assert quantizer(x)[1, 2].isnan()
    x[1, 2] = math.inf
    y = quantizer(x)[1, 2]
    assert not torch.isfinite(y) or y > 0  # clipped like any large value, or visible


@pytest.mark.parametrize("name", ["apot", *ACTIVATIONS])
def test_channels_last_maps_are_quantized_without_a_warning(name: str) -> None:
    quantizer, x = activation_quantizer(name, 3), torch.randn(2, 4, 5, 6)
    y = quantizer(x)
    last = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.equal(quantizer(last), y)
    quantizer(last).sum().backward()
    assert torch.equal(quantizer.codes(last), quantizer.codes(x))


@pytest.mark.parametrize(("build", "name", "bits"), EVERY)
def test_dtypes_checkpoints_and_copies(build: object, name: str, bits: int) -> None:
    quantizer, x = build(name, bits), torch.randn(4, 30)
    copied_before = copy.deepcopy(quantizer)
    y = quantizer(x)
    assert quantizer(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(quantizer(x.bfloat16()), quantizer(x.bfloat16().float()).bfloat16())
    copied_before.load_state_dict(quantizer.state_dict())
    for twin in (copy.deepcopy(quantizer), copied_before, copied_before.eval()):
        assert torch.equal(twin(x), y)
        assert torch.equal(twin.codes(x), quantizer.codes(x))


@pytest.mark.parametrize(
    ("build", "name", "parameter"),
    [
        (activation_quantizer, "nulsq", "steps"),
        (weight_quantizer, "nulsq", "steps"),
        (activation_quantizer, "lcq", "clip"),
        (weight_quantizer, "lcq", "clip"),
        (weight_quantizer, "seq", "alpha"),
        (weight_quantizer, "ewgs", "scale"),
    ],
)
@pytest.mark.parametrize("value", [0.0, -0.3])
def test_parameters_at_zero_or_below_count_as_the_floor(build, name, parameter, value) -> None:
    quantizer = build(name, 3)
    quantizer(torch.rand(64, 4))
    twin = copy.deepcopy(quantizer)
    for one, number in ((quantizer, value), (twin, STEP_FLOOR)):
        with torch.no_grad():
            one.get_parameter(parameter).fill_(number)
    x = torch.rand(32, 4) + 0.1
    assert torch.isfinite(quantizer(x)).all()
    assert torch.equal(quantizer(x), twin(x))
    upstream = torch.ones_like(x)
    (_, found), (_, wanted) = (grads_of(one, x, upstream) for one in (quantizer, twin))
    assert torch.equal(found[parameter], wanted[parameter])
    assert found[parameter].abs().sum() > 0


def test_an_ewgs_interval_that_closes_counts_as_the_floor() -> None:
    quantizer = fitted(EWGS(2), lower=[1.0], upper=[0.5])
    x = torch.rand(20, dtype=torch.float64, requires_grad=True)
    quantizer(x).sum().backward()
    assert torch.isfinite(quantizer(x)).all()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", INTEGER)
def test_integers_times_scale_are_the_weights(name: str) -> None:
    quantizer = weight_quantizer(name, WEIGHTS[name], channels=5)
    weight = torch.randn(5, 4, 3, 3)
    y = quantizer(weight)
    integers, step = quantizer.weight_grid(weight)
    assert integers.dtype == torch.int8
    torch.testing.assert_close(integers * step.reshape(-1, 1, 1, 1), y, rtol=1e-6, atol=1e-7)
    assert int(integers.abs().max()) == quantizer.largest_level
    assert quantizer.tells_weight_grid


def test_integers_of_nine_bits_are_not_told_as_bytes() -> None:
    weight = torch.randn(5, 40)
    for name in ("statsq", "seq", "ewgs"):
        quantizer = weight_quantizer(name, 8)
        quantizer(weight)
        assert quantizer.weight_grid(weight) is None
        assert quantizer.largest_level == 0


@pytest.mark.parametrize(
    ("name", "bits", "line"),
    [
        ("binary", 2, "weight_bits: got 2, allowed is 1 with weight_quantizer 'binary'"),
        ("ternary", 3, "weight_bits: got 3, allowed is 2 with weight_quantizer 'ternary'"),
        ("seq_ternary", 1, "weight_bits: got 1, allowed is 2 with weight_quantizer 'seq_ternary'"),
        ("binary", True, "weight_bits: got True, allowed is 1 with weight_quantizer 'binary'"),
        ("statsq", 1, "weight_bits: got 1, allowed is 2 to 8"),
    ],
)
def test_widths_that_a_method_does_not_have_are_refused(name: str, bits: int, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        weight_quantizer(name, bits)


def test_learned_parameters_are_quantizer_parameters() -> None:
    model = nn.ModuleList(
        [activation_quantizer("nulsq", 2), activation_quantizer("lcq", 2), weight_quantizer("ewgs", 2)]
    )
    names = [name for name, _ in quantizer_parameters(model)]
    assert names == ["0.steps", "1.clip", "1.theta", "2.lower", "2.upper", "2.scale"]


@pytest.mark.parametrize(("build", "name", "bits"), EVERY)
def test_modules_change_their_dtype_as_every_module(build: object, name: str, bits: int) -> None:
    quantizer = build(name, bits)
    quantizer(torch.randn(4, 30))
    assert all(p.dtype == torch.float64 for p in quantizer.double().parameters())
    assert all(p.dtype == torch.float16 for p in quantizer.half().parameters())
