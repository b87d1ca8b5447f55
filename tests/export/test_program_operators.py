"""What exported networks compute with: staircases of thresholds and levels, and sums of integers."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_n2uq.convert.calibrated import CalibratedInput
from lightning_n2uq.export.program import operators
from lightning_n2uq.export.program.staircases import staircase
from lightning_n2uq.quantizers import ACTIVATION_QUANTIZERS, activation_quantizer

METHODS = sorted(set(ACTIVATION_QUANTIZERS) - {"float"})


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_a_staircase_is_the_quantizer_at_every_number(method, bits):
    torch.manual_seed(bits)
    quantizer = CalibratedInput(activation_quantizer(method, bits))
    quantizer.train()(torch.randn(500) * 3 - 1)
    with torch.no_grad():
        for parameter in quantizer.inner.parameters():  # widths, steps, companding: as training leaves them
            if parameter.numel() > 1:
                parameter.mul_(torch.rand_like(parameter) + 0.3).add_(0.3 * torch.rand_like(parameter))
    quantizer.eval()
    found = staircase(quantizer, "layer")
    at = torch.from_numpy(found.thresholds[np.isfinite(found.thresholds)])
    largest = torch.finfo(torch.float32).max
    beside = [torch.nextafter(at, torch.tensor(side)) for side in (-torch.inf, torch.inf)]
    x = torch.cat([at, *beside, torch.randn(2000) * 4, torch.tensor([0.0, -0.0, largest, -largest])])
    codes = operators.codes(x, torch.from_numpy(found.thresholds))
    assert torch.equal(codes, quantizer.codes(x))
    assert torch.equal(torch.from_numpy(found.levels)[codes.long()], quantizer(x))
    assert found.uniform == (method not in ("apot", "nulsq", "lcq"))
    if found.uniform:
        even = found.offset + found.step * np.arange(found.levels.size)
        np.testing.assert_allclose(found.levels, even, atol=1e-6 * np.abs(found.levels).max())


def test_a_staircase_that_falls_or_was_never_fitted_is_refused():
    fresh = CalibratedInput(activation_quantizer("n2uq", 2)).eval()
    with pytest.raises(ValueError, match="layer: its range was never fitted"):
        staircase(fresh, "layer")
    turned = CalibratedInput(activation_quantizer("n2uq", 2)).train()
    turned(torch.randn(100))
    with torch.no_grad():
        turned.inner.scale_in.neg_()
    with pytest.raises(ValueError, match="layer: its code falls as the input grows"):
        staircase(turned.eval(), "layer")
    with torch.no_grad():
        turned.inner.scale_in.abs_()
        turned.inner.scale_out.fill_(torch.inf)
    with pytest.raises(ValueError, match="layer: a level is not finite"):
        staircase(turned, "layer")


@pytest.mark.integration
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_sums_are_exact_on_any_axes(axes, groups):
    torch.manual_seed(axes)
    x = torch.randint(0, 256, (2, 4, *[7] * axes), dtype=torch.uint8)
    weight = torch.randint(-128, 128, (6, 4 // groups, *[3] * axes), dtype=torch.int8)
    window = [2] * axes, [1] * axes, [2] * axes, groups
    found = operators.integer_conv(x, weight, *window)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    expected = convolve(x.double(), weight.double(), None, *window)
    assert found.dtype == torch.int32
    assert torch.equal(found.double(), expected)
    torch.library.opcheck(operators.integer_conv, (x, weight, *window))
    rows = x.reshape(2, -1)
    matrix = torch.randint(-128, 128, (5, rows.shape[1]), dtype=torch.int8)
    assert torch.equal(operators.integer_linear(rows, matrix).long(), rows.long() @ matrix.long().T)
    torch.library.opcheck(operators.integer_linear, (rows, matrix))
    values, places = torch.randn(3, 4), torch.tensor([-0.5, 0.0, 0.0, 0.7])
    torch.library.opcheck(operators.codes, (values, places))


def test_nan_passes_no_threshold():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    assert operators.codes(x, torch.tensor([-1.0, 0.0, 1.0])).tolist() == [0, 3, 0, 1]
