"""Packed weights are kept until they change, and give the operator's values."""

import pytest
import torch

from lightning_n2uq.ops import integer_conv2d, integer_linear
from lightning_n2uq.ops.dispatch import force
from lightning_n2uq.ops.integer import IntegerGeometry
from lightning_n2uq.ops.integer_weight import IntegerWeight

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
