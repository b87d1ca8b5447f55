"""Quantizers with an offset: padding is a zero, not the code zero, so that borders need their own sums."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_n2uq.export import describe, run_numpy
from lightning_n2uq.layers import QuantConv2d, QuantSpec

SPEC = QuantSpec(4, 4, weight_quantizer="lsq", activation_quantizer="lsq_plus")


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (2, 1), (1, 2)])
def test_the_deployed_layer_computes_what_the_trained_one_does(
    kernel: int, padding: int, groups: int, stride: int
) -> None:
    quantized = QuantConv2d(6, 4, kernel, stride, padding, groups=groups, spec=SPEC)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), quantized)
    x = torch.randn(4, 3, 7, 6)
    with torch.no_grad():
        model[0].bias -= 2
        model(x)  # takes first values from data
        expected = model.eval()(x)
    assert quantized.activation_quantizer.offset.item() < -1
    description = describe(model, (3, 7, 6))
    found = run_numpy(description, x.numpy())[description.output]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-3)
