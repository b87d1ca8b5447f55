"""The package's own networks take bits layer by layer from a policy."""

import pytest
import torch

from lightning_n2uq import backbones
from lightning_n2uq.layers import QuantConv2d
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.quantizers import PACT, LearnableThresholdQuantizer

RULES = [
    {"name": "layer1.*", "weight_bits": 3, "activation_bits": 4},
    {"name": "layer3.2.conv2", "weight_quantizer": "lsq"},
    {"name": "layer3.1.*", "quantize": False},
]


def bits(network):
    layers = {name: m for name, m in network.named_modules() if isinstance(m, QuantConv2d)}
    kinds = ("weight_quantizer", "activation_quantizer")
    return {name: tuple(getattr(getattr(m, k), "bits", 32) for k in kinds) for name, m in layers.items()}


def test_every_layer_has_the_bits_of_its_rule():
    network = backbones.build(
        "resnet20", width=4, policy={"weight_bits": 2, "activation_bits": 2, "rules": RULES}
    )
    found = bits(network)
    assert found["layer1.0.conv1"] == (3, 4)
    assert found["layer2.0.downsample.0"] == (2, 2)
    assert found["layer3.1.conv1"] == (32, 32)
    assert network.layer3[2].conv2.weight_quantizer.name == "lsq"
    assert type(network.layer1[0].conv1) is QuantConv2d
    assert type(network.layer1[0].conv1.activation_quantizer) is LearnableThresholdQuantizer
    plain = backbones.build("resnet20", width=4)
    same = backbones.build("resnet20", width=4, policy={})
    assert set(bits(same).values()) == {(2, 2)}
    assert plain.state_dict().keys() == same.state_dict().keys()
    assert [type(a) for a in plain.modules()] == [type(b) for b in same.modules()]


def test_bits_of_the_arguments_are_the_policys_defaults():
    network = backbones.build(
        "resnet20",
        weight_bits=4,
        activation_bits=3,
        width=4,
        quantize_downsample=False,
        policy={"rules": RULES[:1]},
    )
    found = bits(network)
    assert found["layer1.0.conv1"] == (3, 4)
    assert found["layer2.0.conv1"] == (4, 3)
    assert "layer2.0.downsample.0" not in found
    last = backbones.build("mobilenet_v2", policy={"weight_bits": 3}).features[18].conv1
    assert isinstance(last.activation_quantizer, PACT)


def test_a_classifier_with_a_policy_trains_and_loads():
    torch.manual_seed(0)
    arguments = {"in_channels": 1, "image_size": 8, "backbone_args": {"width": 4, "policy": {"rules": RULES}}}
    model, other = QuantizedClassifier(**arguments), QuantizedClassifier(**arguments)
    images = torch.randn(4, 1, 8, 8)
    model(images).sum().backward()
    weight = model.backbone.layer1[0].conv1.weight.grad
    assert weight is not None
    assert weight.abs().sum() > 0
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(images), model.eval()(images))
    assert model.evaluation().startswith("the integer network")


def test_what_a_policy_cannot_say_about_these_networks_is_one_line():
    with pytest.raises(ValueError, match="policy: got one that quantizes 'conv1', which resnet20 keeps"):
        backbones.build("resnet20", policy={"skip_first": False})
    with pytest.raises(ValueError, match="residual_bits: got 8, allowed is null beside a policy"):
        backbones.build("resnet20", residual_bits=8, policy={"weight_bits": 2})
    with pytest.raises(ValueError, match="policy: got bits, allowed are weight_bits"):
        backbones.build("resnet20", policy={"bits": 2})
