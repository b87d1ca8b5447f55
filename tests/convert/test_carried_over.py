"""What users have put on a layer is on its quantized counterpart, too."""

import pytest
import torch
from torch import nn

from lightning_n2uq.convert import quantize_model


def network():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 8), nn.Linear(8, 2)
    )
    for layer in (net[1], net[3]):
        layer.note = "from the user"
        layer.register_buffer("kept", torch.ones(2))
        layer.register_buffer("passing", torch.ones(3), persistent=False)
        layer.register_parameter("extra", nn.Parameter(torch.zeros(1)))
        layer.add_module("child", nn.Identity())
    return net


@pytest.mark.parametrize("place", [1, 3])
def test_attributes_buffers_parameters_and_children_are_carried_over(place):
    net = network()
    old = net[place]
    assert len(quantize_model(net).quantized) == 2
    new = net[place]
    assert new is not old
    assert new.note == "from the user"
    assert new.kept is old.kept
    assert new.passing is old.passing
    assert new.extra is old.extra
    assert new.child is old.child
    keys = net.state_dict()
    assert f"{place}.kept" in keys
    assert f"{place}.passing" not in keys


@pytest.mark.parametrize("place", [1, 3])
def test_hooks_are_carried_over(place):
    net, seen = network(), []
    layer = net[place]
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    handle = layer.register_forward_hook(lambda module, args, output: seen.append("after"))
    layer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append("kwargs"), with_kwargs=True, always_call=True
    )
    layer.register_full_backward_hook(lambda module, before, after: seen.append("backward"))
    quantize_model(net)
    net(torch.randn(2, 3, 6, 6)).sum().backward()
    assert seen == ["before", "after", "kwargs", "backward"]
    handle.remove()
    seen.clear()
    net(torch.randn(2, 3, 6, 6))
    assert seen == ["before", "kwargs"]


def test_a_layer_whose_forward_was_replaced_is_left_alone():
    net = network()
    net[3].forward = lambda x: x[:, :8]
    report = quantize_model(net)
    assert report.unsupported == ["3"]
    assert "its forward was replaced on this one layer" in str(report)


def helper(x, layer):
    return torch.nn.functional.linear(x, layer.weight)


class Helped(nn.Module):
    """A helper reads the weight of a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.first, self.read, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(helper(self.first(x), self.read))


def test_a_layer_whose_weight_is_read_by_others_is_named():
    net = Helped()
    with pytest.warns(UserWarning, match=r"^quantize_model: read: no calibration batch ran through"):
        quantize_model(net, {"skip_first": False, "skip_last": False}, calibration=[torch.randn(8, 4)])
    net = Helped()
    net.alias = net.read.weight
    report = quantize_model(net, {"skip_first": False, "skip_last": False})
    (line,) = [line for line in report.of("quantized") if line.name == "read"]
    assert "its weight is also alias, which reads floats" in line.reason
