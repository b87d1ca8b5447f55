"""Quantized layers compute what their parts say."""

import pytest
import torch
import torch.nn.functional as F

from lightning_n2uq.layers import BiasedPReLU, QuantConv2d, QuantLinear, QuantSpec


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0)])
def test_convolution_is_that_of_the_quantized_operands(stride: int, padding: int, groups: int) -> None:
    layer = QuantConv2d(4, 8, 3, stride, padding, groups=groups, spec=QuantSpec(3, 2))
    x = torch.randn(2, 4, 9, 9)
    expected = F.conv2d(
        layer.activation_quantizer(x),
        layer.weight_quantizer(layer.weight),
        layer.bias,
        stride,
        padding,
        groups=groups,
    )
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_linear_is_that_of_the_quantized_operands() -> None:
    layer = QuantLinear(12, 5, spec=QuantSpec(2, 4, "dorefa", "pact"))
    x = torch.randn(3, 7, 12)
    expected = F.linear(layer.activation_quantizer(x), layer.weight_quantizer(layer.weight), layer.bias)
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_float_state_dict_keys_stay() -> None:
    keys = set(QuantConv2d(4, 8, 3).state_dict())
    assert set(torch.nn.Conv2d(4, 8, 3).state_dict()) < keys
    assert all("quantizer" in key for key in keys - {"weight", "bias"})


def test_every_parameter_gets_a_gradient() -> None:
    layer = QuantConv2d(4, 8, 3)
    layer(torch.randn(2, 4, 9, 9)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_biased_prelu() -> None:
    layer = BiasedPReLU(2)
    with torch.no_grad():
        layer.bias_in.copy_(torch.tensor([0.5, -0.5]))
        layer.bias_out.copy_(torch.tensor([1.0, 2.0]))
        layer.slope.copy_(torch.tensor([0.1, 0.2]))
    x = torch.tensor([[-1.0, 1.0]]).view(1, 2, 1, 1)
    assert torch.allclose(layer(x).flatten(), torch.tensor([-0.5 * 0.1 + 1.0, 0.5 + 2.0]))


def test_bad_spec_is_named() -> None:
    with pytest.raises(ValueError, match="weight_bits: got 9, allowed is 2 to 8"):
        QuantConv2d(4, 8, 3, spec=QuantSpec(9, 2))
