import pytest

from lightning_n2uq.convert import Layer, Policy, Rule


def layer(name="body.conv", types=("conv",), index=3, count=10):
    return Layer(name, types, index, count)


def bits(policy, which):
    spec, _ = policy.decide(which)
    return spec and spec.weight_bits


def test_first_and_last_stay_float_unless_the_policy_says_otherwise():
    first, last = layer(index=0), layer(index=9)
    policy = Policy()
    assert policy.decide(first) == (None, "first layer")
    assert policy.decide(last) == (None, "last layer")
    assert bits(policy, layer()) == 4
    assert bits(Policy(skip_first=False, skip_last=False), first) == 4
    assert bits(Policy(skip_first=False, skip_last=False), last) == 4


def test_only_a_rule_about_the_position_reaches_the_first_layer():
    assert bits(Policy(rules=(Rule(weight_bits=8),)), layer(index=0)) is None
    assert bits(Policy(rules=(Rule(position="first", weight_bits=8),)), layer(index=0)) == 8
    assert bits(Policy(rules=(Rule(position="last", weight_bits=8),)), layer(index=9)) == 8


@pytest.mark.parametrize(
    ("rule", "fitting", "other"),
    [
        ({"name": "body.*"}, layer(), layer("head.conv")),
        ({"type": "depthwise"}, layer(types=("depthwise", "conv")), layer()),
        ({"type": "conv"}, layer(types=("pointwise", "conv")), layer(types=("linear",))),
        ({"type": "attention"}, layer(types=("attention",)), layer(types=("linear",))),
        ({"position": "2:4"}, layer(), layer(index=4)),
        ({"position": "-3:"}, layer(index=8), layer()),
        ({"name": "body.*", "type": "linear"}, layer(types=("linear",)), layer()),
    ],
)
def test_rules_select_by_name_type_and_position(rule, fitting, other):
    policy = Policy.from_mapping({"weight_bits": 4, "rules": [{**rule, "weight_bits": 7}]})
    assert bits(policy, fitting) == 7
    assert bits(policy, other) == 4


def test_the_first_matching_rule_decides_and_the_rest_comes_from_the_policy():
    policy = Policy.from_mapping(
        {
            "activation_quantizer": "lsq",
            "rules": [
                {"name": "body.*", "quantize": False, "type": "linear"},
                {"name": "body.*", "weight_bits": 3, "weight_quantizer": "apot"},
                {"weight_bits": 8},
            ],
        }
    )
    spec, reason = policy.decide(layer())
    assert (spec.weight_bits, spec.activation_bits) == (3, 4)
    assert (spec.weight_quantizer, spec.activation_quantizer) == ("apot", "lsq")
    assert reason == "rule 1"
    assert policy.decide(layer(types=("linear",))) == (None, "rule 0")


def test_all_float_is_no_quantization():
    policy = Policy(32, 32, "float", "float")
    assert policy.decide(layer()) == (None, "default: float")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight_bit": 4}, "policy: got weight_bit"),
        ({"rules": [{"nmae": "x"}]}, "rules: got nmae"),
        ({"rules": ["x"]}, "rules: got 'x'"),
        ({"rules": [{"type": "norm"}]}, "type: got 'norm'"),
        ({"rules": [{"position": "middle"}]}, "position: got 'middle'"),
        ({"rules": [{"position": "1:2:3"}]}, "position: got '1:2:3'"),
        ({"rules": [{"weight_bits": 9}]}, "weight_bits: got 9"),
        ({"activation_quantizer": "nope"}, "activation_quantizer: got 'nope'"),
    ],
)
def test_mistakes_are_named_before_anything_is_converted(values, message):
    with pytest.raises(ValueError, match=message):
        Policy.from_mapping(values)
