import subprocess
import sys

import pytest
import torch

from lightning_n2uq import backbones
from lightning_n2uq.convert import build_converted
from lightning_n2uq.layers import QuantConv2d

SHARED = {
    "weight_bits": 3,
    "activation_bits": 3,
    "weight_quantizer": "n2uq",
    "activation_quantizer": "n2uq",
    "num_classes": 5,
    "in_channels": 3,
}


def bits(model):
    return {n: m.weight_quantizer.bits for n, m in model.named_modules() if isinstance(m, QuantConv2d)}


def test_torchvision_networks_by_name_with_a_policy():
    policy = {"rules": [{"name": "layer1.*", "weight_bits": 8}]}
    model = backbones.build("torchvision/resnet18", **SHARED, quantize_downsample=False, policy=policy)
    found = bits(model)
    assert found["layer1.0.conv1"] == 8
    assert found["layer2.0.conv1"] == 3
    assert "layer2.0.downsample.0" not in found
    assert "layer2.0.downsample.0" in bits(build_converted("torchvision/resnet18", **SHARED))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_timm_networks_by_name_take_any_channels():
    pytest.importorskip("timm", reason="timm is an extra")
    model = backbones.build("timm/test_resnet", **{**SHARED, "in_channels": 1}, quantize_downsample=True)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    assert set(bits(model).values()) == {3}


def test_a_networks_own_arguments_may_stand_beside_the_policy():
    arguments = {"model_args": {"dropout": 0.5}, "width_mult": 0.25, "policy": {"weight_bits": 5}}
    model = backbones.build("torchvision/mobilenet_v2", **{**SHARED, **arguments})
    assert model.features[0][0].out_channels == 8
    assert model.classifier[0].p == 0.5
    assert set(bits(model).values()) == {5}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("torchvision/nope", {}, "torchvision has no classification model 'nope'"),
        ("torchvision/resnet18", {"in_channels": 1}, "in_channels: got 1"),
        ("torchvision/resnet18", {"policy": {"rule": []}}, "policy: got rule"),
        ("torchvision/resnet18", {"wdith": 3}, "arguments of torchvision/resnet18: got {'wdith': 3}"),
        ("torchvision/resnet18", {"model_args": {"wdith": 3}}, "got {'wdith': 3}, refused"),
        ("hub/resnet18", {}, "backbone: got 'hub/resnet18'"),
    ],
)
def test_mistakes_are_user_errors(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        backbones.build(name, **{**SHARED, **arguments})


def test_unknown_timm_models_are_user_errors():
    pytest.importorskip("timm", reason="timm is an extra")
    with pytest.raises(ValueError, match="timm has no model 'nope'"):
        build_converted("timm/nope")


@pytest.mark.integration
def test_a_network_is_built_where_no_trainer_was_ever_imported() -> None:
    code = "from lightning_n2uq.backbones import build; build('torchvision/squeezenet1_1', num_classes=2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
