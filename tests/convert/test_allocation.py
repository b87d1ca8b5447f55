"""`allocate_bits`: the solver's widths meet the budget, are the best there are, and travel as a policy."""

import itertools
import math
import random

import pytest

from lightning_n2uq.convert import LayerScores, Policy, Sensitivity, allocate_bits
from lightning_n2uq.convert.allocation import COSTS
from lightning_n2uq.convert.policy import Layer
from lightning_n2uq.convert.widths import Width, width, widths
from lightning_n2uq.layers import QuantSpec

SPEC = QuantSpec(weight_quantizer="lsq", activation_quantizer="n2uq")


def scores(kl, macs, weights, bits=(2, 4), policy=None, **more):
    tried = widths(bits)
    layers = [
        LayerScores(f"block.{i}", w, m, SPEC, kl=dict(zip(tried, row, strict=True)), **more)
        for i, (row, m, w) in enumerate(zip(kl, macs, weights, strict=True))
    ]
    return Sensitivity(layers, tried, policy or Policy(weight_quantizer="lsq"), 1)


def random_scores(seed, layers=5, bits=(2, 3, 4)):
    draw = random.Random(seed)
    kl = [[draw.random() for _ in bits] for _ in range(layers)]
    sizes = [[draw.randrange(1, 10**9) for _ in range(layers)] for _ in range(2)]
    return scores(kl, *sizes, bits)


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize("seed", range(4))
def test_no_other_choice_within_the_budget_is_better(kind, seed):
    found = random_scores(seed)
    cost = COSTS[kind]
    for share in (0.7, 1.0, 1.3):
        chosen = allocate_bits(found, f"{kind}={share}*uniform:3")
        limit = share * sum(cost(layer, Width(3, 3)) for layer in found.layers)
        assert chosen.cost == sum(cost(layer, chosen.widths[layer.name]) for layer in found.layers) <= limit
        best = min(
            sum(layer.kl[w] for layer, w in zip(found.layers, choice, strict=True))
            for choice in itertools.product(found.widths, repeat=len(found.layers))
            if sum(cost(layer, w) for layer, w in zip(found.layers, choice, strict=True)) <= limit
        )
        assert chosen.score == pytest.approx(best, rel=1e-5)


def test_a_mixture_beats_uniform_bits_at_the_same_cost():
    # One layer that suffers much and costs little beside one that suffers little and costs much.
    found = scores([[9.0, 1.0, 0.1], [0.3, 0.2, 0.1]], [1000, 5000], [8, 8], bits=(2, 3, 4))
    chosen = allocate_bits(found, "bitops=uniform:3")
    assert [str(w) for w in chosen.widths.values()] == ["4", "2"]
    assert chosen.cost == 1000 * 16 + 5000 * 4
    limit, uniform = chosen.uniform()[Width(3, 3)]
    assert chosen.cost <= limit == 6000 * 9
    assert chosen.score == pytest.approx(0.4)
    assert chosen.score < uniform == pytest.approx(1.2)
    assert "uniform 3: 54,000, sum of kl 1.2" in str(chosen)


def test_budgets_are_met_to_the_last_bit():
    # The whole budget is 1 above what two layers at 4 bits cost: float tolerances must not let a third in.
    found = scores([[1.0, 0.0]] * 3, [10**9, 10**9, 10**9], [1, 1, 1])
    exact = 16 * 10**9 * 2 + 4 * 10**9
    assert allocate_bits(found, f"bitops={exact}").cost == exact
    assert allocate_bits(found, f"bitops={exact - 1}").cost == exact - 12 * 10**9
    found = scores([[1.0, 0.0]] * 2, [1, 1], [1000, 3000])
    chosen = allocate_bits(found, "mean_bits=2.5")
    assert chosen.widths == {"block.0": Width(4, 4), "block.1": Width(2, 2)}
    assert "mean_bits=2.5: 2.5 of 2.5" in str(chosen)
    assert allocate_bits(found, "weight_bytes=1250").cost == 1250


def test_a_budget_that_is_too_small_names_the_smallest():
    found = random_scores(0)
    smallest = sum(layer.bit_operations(Width(2, 2)) for layer in found.layers)
    with pytest.raises(
        ValueError, match=f"^budget: got 'bitops=5', allowed is {smallest} or more: .* 2, 3, 4"
    ):
        allocate_bits(found, "bitops=5")
    assert allocate_bits(found, f"bitops={smallest}").cost == smallest
    with pytest.raises(ValueError, match="allowed is 2 or more"):
        allocate_bits(found, "mean_bits=1.5")


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("bitops", "is NAME=VALUE with bitops, weight_bytes, mean_bits"),
        ("flops=3", "got 'flops', allowed are bitops, weight_bytes, mean_bits"),
        ("bitops=many", "is a number above 0, uniform:WIDTH or NUMBER"),
        ("bitops=nan", "is a number above 0"),
        ("bitops=-1*uniform:4", "is a number above 0"),
        ("bitops=uniform:9", "budget: got '9', allowed are 2 to 8"),
    ],
)
def test_impossible_budgets_are_one_line(budget, message):
    with pytest.raises(ValueError, match=message) as caught:
        allocate_bits(random_scores(0), budget)
    assert "\n" not in str(caught.value)


def test_scores_that_are_no_numbers_are_named():
    found = scores([[math.nan, 0.0]], [1], [1])
    with pytest.raises(ValueError, match=r"scores: got kl nan of block.0 at 2 bits"):
        allocate_bits(found, "bitops=uniform:4")
    with pytest.raises(ValueError, match="by: got 'loss', allowed are kl"):
        allocate_bits(random_scores(0), "bitops=uniform:4", by="loss")


def test_files_and_policies_keep_everything():
    old = {"weight_quantizer": "n2uq", "rules": [{"name": "block.9", "quantize": False}]}
    found = scores([[1.0, 0.5]], [7], [9], bits=("2/4", 4), policy=Policy.from_mapping(old), position="first")
    found.left_out["head"] = "last layer"
    again = Sensitivity.from_mapping(found.to_mapping())
    assert again == found
    assert str(again) == str(found)
    policy = allocate_bits(again, "bitops=8*uniform:2").to_policy()
    assert Policy.from_mapping(policy.to_mapping()) == policy
    spec, _ = policy.decide(Layer("block.0", ("conv",), 0, 3))  # the first layer, which defaults leave out
    assert spec == QuantSpec(4, 4, "lsq", "n2uq")
    assert policy.decide(Layer("block.9", ("conv",), 1, 3))[0] is None
    with pytest.raises(ValueError, match="scores: got 'list', allowed is a file that n2uq sensitivity"):
        Sensitivity.from_mapping([])
    with pytest.raises(ValueError, match="scores: got a damaged file"):
        Sensitivity.from_mapping({"format": 1})


def test_widths_are_numbers_or_pairs():
    assert width(4) == width("4") == Width(4, 4)
    assert str(width("2/8")) == "2/8"
    assert widths([8, "4/2", 2, "8"]) == (Width(2, 2), Width(4, 2), Width(8, 8))
    for wrong in ("1", 9, "2/", "2/3/4", "x", True, 2.5, []):
        with pytest.raises(ValueError, match="bits: got"):
            width(wrong)
