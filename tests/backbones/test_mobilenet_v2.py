import pytest
import torch
from torchvision import models

from lightning_n2uq import backbones
from lightning_n2uq.layers import QuantConv2d
from lightning_n2uq.quantizers import LSQ, PACT, FullPrecision, LearnableThresholdQuantizer


def test_layers_are_quantized_as_in_the_paper():
    mobilenet, model = models.mobilenet_v2(weights=None), backbones.mobilenet_v2(num_classes=5)
    convs = {name: m for name, m in model.named_modules() if isinstance(m, QuantConv2d)}
    assert len(convs) == 17 * 3 + 1
    assert isinstance(convs["features.18.conv1"].activation_quantizer, PACT)
    assert convs["features.1.conv1"].weight.shape == (
        32,
        32,
        1,
        1,
    )  # the expansion that torchvision leaves out
    depthwise = convs["features.2.conv2"]
    assert (depthwise.groups, depthwise.stride) == (96, (2, 2))
    assert isinstance(depthwise.activation_quantizer, LearnableThresholdQuantizer)
    assert type(model.features[0].conv1) is torch.nn.Conv2d
    assert type(model.fc) is torch.nn.Linear
    theirs = [m for m in mobilenet.features.modules() if type(m) is torch.nn.Conv2d][1:]
    expansion = 32 * 32
    assert sum(m.weight.numel() for m in convs.values()) == sum(m.weight.numel() for m in theirs) + expansion


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        ({"activation_quantizer": "lsq"}, LSQ),
        ({"activation_quantizer": "lsq", "last_activation_quantizer": "pact"}, PACT),
        (
            {
                "weight_bits": 32,
                "activation_bits": 32,
                "weight_quantizer": "float",
                "activation_quantizer": "float",
            },
            FullPrecision,
        ),
    ],
)
def test_last_convolution_follows_the_method(arguments, last):
    model = backbones.build("mobilenet_v2", num_classes=5, **arguments)
    assert isinstance(model.features[18].conv1.activation_quantizer, last)


def test_trains_and_strides_by_32():
    model = backbones.mobilenet_v2(num_classes=5, in_channels=1)
    assert model.features(torch.randn(2, 1, 64, 64)).shape == (2, 1280, 2, 2)
    model(torch.randn(2, 1, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_wrong_values_are_named():
    with pytest.raises(ValueError, match="num_classes: got 0"):
        backbones.mobilenet_v2(num_classes=0)
    with pytest.raises(ValueError, match="x: got shape"):
        backbones.mobilenet_v2(num_classes=2)(torch.randn(1, 1, 32, 32))
