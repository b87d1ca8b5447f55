"""Positions between levels: the codes are their nearest integers, and their gradient is the true one."""

import pytest
import torch
from torch import Tensor, nn

from lightning_n2uq.quantizers import (
    ACTIVATION_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    activation_quantizer,
    allowed_bits,
    weight_quantizer,
)
from lightning_n2uq.quantizers.positions import level_position

CASES = [(activation_quantizer, name) for name in ACTIVATION_QUANTIZERS if name != "float"]
CASES += [(weight_quantizer, name) for name in WEIGHT_QUANTIZERS if name != "float"]


def values() -> Tensor:
    """Far beyond both ends of every range, per channel."""
    return torch.cat([torch.randn(4, 200), 9 * torch.randn(4, 50)], 1)


def bits_of(build: object, name: str, wanted: int) -> int:
    """The allowed width that is nearest to the wanted one."""
    registry = ACTIVATION_QUANTIZERS if build is activation_quantizer else WEIGHT_QUANTIZERS
    low, high = allowed_bits(registry[name])
    return min(max(wanted, low), high)


@pytest.mark.parametrize(("build", "name"), CASES)
@pytest.mark.parametrize("bits", [2, 3, 5])
def test_codes_are_the_nearest_integers(build: object, name: str, bits: int) -> None:
    quantizer, x = build(name, bits_of(build, name, bits)), values()
    quantizer(x)  # takes first values from data
    position, codes = level_position(quantizer, x), quantizer.codes(x)
    assert position.shape == x.shape
    assert position.dtype == torch.float32
    assert position.min() >= 0
    assert position.max() == codes.max()
    clear = (position - position.floor() - 0.5).abs() > 1e-4
    assert clear.float().mean() > 0.9
    assert torch.equal(position.detach().round()[clear].to(torch.uint8), codes[clear])


@pytest.mark.parametrize(("build", "name"), CASES)
def test_gradients_are_those_of_differences(build: object, name: str) -> None:
    quantizer = build(name, bits_of(build, name, 3)).double()
    quantizer(values().double())
    x = (torch.rand(2, 60, dtype=torch.float64) * 1.5).requires_grad_()
    step = 1e-7 * torch.randn_like(x)
    position = level_position(quantizer, x)
    assert position.dtype == torch.float64
    (grad,) = torch.autograd.grad(position.square().sum(), x)
    ahead, behind = (level_position(quantizer, x.detach() + s).square().sum() for s in (step, -step))
    assert (grad * step).sum().item() == pytest.approx(((ahead - behind) / 2).item(), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(("build", "name"), [case for case in CASES if case[1] != "dorefa"])
def test_two_bits_are_the_default(build: object, name: str) -> None:
    bits = bits_of(build, name, 2)  # or what else the method has
    kind = type(build(name, bits))
    assert kind().bits == bits
    assert kind().num_levels == build(name, bits).num_levels


def test_other_modules_have_no_positions() -> None:
    with pytest.raises(ValueError, match="quantizer: got Linear, which has no positions between levels"):
        level_position(nn.Linear(2, 2), torch.randn(3))


# Of the weights' methods, apot subtracts the mean in the weight's own precision.
@pytest.mark.parametrize(("build", "name"), [case for case in CASES if case != (weight_quantizer, "apot")])
def test_half_precision_is_computed_in_single_precision(build: object, name: str) -> None:
    quantizer, x = build(name, bits_of(build, name, 3)), values().bfloat16()
    quantizer(x.float())
    assert torch.equal(quantizer.codes(x), quantizer.codes(x.float()))
    assert torch.equal(quantizer(x), quantizer(x.float()).bfloat16())


def test_dorefa_keeps_double_precision() -> None:
    x = torch.linspace(0, 1, 29, dtype=torch.float64).reshape(1, -1)
    for steps in (activation_quantizer("dorefa", 3)(x) * 7, (weight_quantizer("dorefa", 3)(x) + 1) * 3.5):
        assert (steps - steps.round()).abs().max() < 1e-12
