"""Packed weights are kept until they change, and give the operator's values."""

import copy
import pickle

import pytest
import torch

from lightning_n2uq.ops import integer_conv2d, integer_linear
from lightning_n2uq.ops.dispatch import force
from lightning_n2uq.ops.integer import IntegerGeometry
from lightning_n2uq.ops.integer_weight import CurrentWeight, IntegerWeight

LIMITS = {"largest_code": 15, "largest_level": 15}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randint(-15, 16, shape, dtype=torch.int8)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_a_packed_convolution_gives_the_operators_values(form, kernels):
    levels, scale, bias = drawn(6, 2, 3, 3), torch.rand(6), torch.rand(6)
    with force(kernels):
        weight = IntegerWeight(levels, scale, bias, IntegerGeometry((2, 1), (1, 1), (1, 1), 2), **LIMITS)
        for size in ((1, 4, 5, 5), (3, 4, 8, 7)):
            codes = torch.randint(16, size, dtype=torch.uint8).contiguous(memory_format=form)
            expected = integer_conv2d(codes, levels, scale, bias, (2, 1), 1, 1, 2, **LIMITS)
            assert torch.equal(weight.conv2d(codes), expected)
            compiled = torch.compile(weight.conv2d, backend="eager")
            assert torch.equal(compiled(codes, torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_packed_linear_layer_gives_the_operators_values(kernels):
    levels, scale = drawn(6, 20), torch.rand(6)
    with force(kernels):
        weight = IntegerWeight(levels, scale, **LIMITS)
        codes = torch.randint(16, (2, 3, 20), dtype=torch.uint8)
        assert torch.equal(weight.linear(codes), integer_linear(codes, levels, scale, **LIMITS))


class Counted:
    """Makes a weight of a layer and counts how often."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.layer, self.cache, self.count = layer, CurrentWeight(), 0

    def get(self) -> IntegerWeight:
        return self.cache.get((self.layer.weight, self.layer.bias), self.make)

    def make(self) -> IntegerWeight:
        self.count += 1
        levels = self.layer.weight.detach().sign().to(torch.int8)
        return IntegerWeight(levels, torch.ones(len(levels)), self.layer.bias, **LIMITS)


def step(layer: torch.nn.Module) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()


CHANGES = {
    "optimizer": step,
    "in place": lambda layer: layer.weight.detach().mul_(2),
    "bias in place": lambda layer: layer.bias.detach().add_(1),
    "load_state_dict": lambda layer: layer.load_state_dict(torch.nn.Linear(4, 3).state_dict()),
    "new parameter": lambda layer: setattr(layer, "weight", torch.nn.Parameter(torch.randn(3, 4))),
    "to": lambda layer: layer.to(torch.bfloat16),
    "data": lambda layer: setattr(layer.weight, "data", layer.weight.data.clone()),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_weight_is_packed_again_when_it_has_changed(change):
    counted = Counted(torch.nn.Linear(4, 3))
    first = counted.get()
    assert counted.get() is first
    CHANGES[change](counted.layer)
    assert counted.get() is not first
    assert counted.get() is counted.get()
    assert counted.count == 2


def test_another_backend_packs_again():
    counted = Counted(torch.nn.Linear(4, 3))
    counted.get()
    with force("reference"):
        counted.get()
    counted.cache.clear()
    counted.get()
    assert counted.count == 3 if counted.cache._key[-1] != "reference" else 2


def test_weights_made_in_inference_mode_are_never_kept():
    with torch.inference_mode():
        counted = Counted(torch.nn.Linear(4, 3))
        counted.get()
        counted.get()
    assert counted.count == 2


def test_copies_and_pickles_of_a_cache_are_empty():
    counted = Counted(torch.nn.Linear(4, 3))
    counted.get()
    for other in (copy.deepcopy(counted.cache), pickle.loads(pickle.dumps(counted.cache))):
        assert other._made is None
