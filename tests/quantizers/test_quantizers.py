"""Every method behind the one interface: levels, codes, gradients by the papers, errors."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_n2uq import quantizers
from lightning_n2uq.quantizers import (
    ACTIVATION_QUANTIZERS,
    LSQ,
    PACT,
    WEIGHT_QUANTIZERS,
    APoT,
    APoTWeight,
    DoReFa,
    DoReFaWeight,
    FixedThresholdQuantizer,
    LearnableThresholdQuantizer,
    LSQPlus,
    activation_quantizer,
    allowed_bits,
    quantizer_parameters,
    weight_quantizer,
)
from lightning_n2uq.quantizers.apot import apot_magnitudes

ACTIVATIONS = [name for name in ACTIVATION_QUANTIZERS if name != "float"]
WEIGHTS = [name for name in WEIGHT_QUANTIZERS if name != "float"]


def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of `sum(module(x))` with respect to the input and to every parameter."""
    x = x.clone().requires_grad_()
    module(x).sum().backward()
    return x.grad, {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_codes_index_the_output_levels(name: str, bits: int) -> None:
    quantizer = activation_quantizer(name, bits)
    x = torch.randn(4, 3, 8, 8)
    y, codes = quantizer(x), quantizer.codes(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert codes.dtype == torch.uint8
    assert 1 < len(y.unique()) <= quantizer.num_levels <= 2**bits
    assert codes.int().max() < quantizer.num_levels
    order = codes.flatten().argsort(stable=True)
    assert (y.flatten()[order].diff() >= 0).all()  # a higher code is a higher value
    assert len(codes.unique()) == len(y.unique())


WEIGHTS_OF_BITS = [
    (name, bits)
    for name in WEIGHTS
    for bits in (1, 2, 3, 4)
    if allowed_bits(WEIGHT_QUANTIZERS[name])[0] <= bits <= allowed_bits(WEIGHT_QUANTIZERS[name])[1]
]


@pytest.mark.parametrize(("name", "bits"), WEIGHTS_OF_BITS)
def test_weight_codes_index_the_levels_of_each_channel(name: str, bits: int) -> None:
    quantizer = weight_quantizer(name, bits)
    weight = torch.randn(6, 5, 3, 3) * 0.1
    quantized, codes = quantizer(weight), quantizer.codes(weight)
    assert quantized.shape == weight.shape
    assert codes.int().max() < quantizer.num_levels <= 2**bits
    for values, indices in zip(quantized.flatten(1), codes.flatten(1), strict=True):
        assert (values[indices.argsort(stable=True)].diff() >= 0).all()
        assert 1 < len(values.unique()) <= quantizer.num_levels


# n2uq as it starts: learned thresholds need not keep levels. EWGS takes an interval to 0 .. 1.
@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "ewgs"])
def test_values_on_the_levels_are_fixed_points(name: str) -> None:
    quantizer = activation_quantizer(name, 3)
    y = quantizer(torch.randn(500)).detach()
    assert torch.allclose(quantizer(y), y, atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_stays_nan(name: str) -> None:
    quantizer = activation_quantizer(name, 2)
    quantizer(torch.randn(100))
    assert quantizer(torch.tensor([1.0, math.nan])).isnan().tolist() == [False, True]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_half_precision_in_and_out(name: str) -> None:
    quantizer = activation_quantizer(name, 2)
    assert quantizer(torch.randn(64).bfloat16()).dtype == torch.bfloat16


def test_lsq_gradients() -> None:
    quantizer = LSQ(2).eval()
    quantizer.load_state_dict({"step": torch.tensor([0.5]), "initialized": torch.tensor(True)})
    x = torch.tensor([-1.0, 0.3, 0.8, 9.0])  # x / step = -2, 0.6, 1.6, 18; levels 0..3
    grad_x, grads = gradients(quantizer, x)
    assert grad_x.tolist() == [0, 1, 1, 0]
    expected = (0 + (1 - 0.6) + (2 - 1.6) + 3) / math.sqrt(4 * 3)
    assert grads["step"].item() == pytest.approx(expected, rel=1e-5)
    assert quantizer(x).tolist() == [0, 0.5, 1.0, 1.5]


def test_lsq_first_step_and_signed_levels() -> None:
    weight = torch.randn(100_000)
    quantizer = LSQ(3, signed=True)
    quantizer(weight)
    assert quantizer.step.item() == pytest.approx((2 * weight.abs().mean() / math.sqrt(3)).item())
    assert (quantizer(weight) / quantizer.step).round().unique().tolist() == list(range(-4, 4))


@pytest.mark.parametrize("bits", [2, 4])
def test_lsq_plus_begins_with_the_range_of_least_error_whatever_outliers_there_are(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.silu(2 * torch.randn(4000, generator=generator))
    x[0] = 40.0
    quantizer = LSQPlus(bits)
    tried = []
    for low in torch.linspace(-0.3, 0.0, 7):
        for high in torch.linspace(1.0, 41.0, 81):
            step = (high - low) / (2**bits - 1)
            tried.append((((x - low) / step).round().clamp(0, 2**bits - 1) * step + low - x).square().mean())
    assert (quantizer(x) - x).square().mean().item() < 1.1 * min(tried).item()
    assert quantizer.offset.item() <= 0


def test_lsq_plus_is_exported_before_its_first_data_with_a_batch_of_any_size_and_hides_no_nan() -> None:
    quantizer = LSQPlus(2).eval()
    sizes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    exported = torch.export.export(quantizer, (torch.randn(4, 3, 8, 8),), dynamic_shapes=sizes).module()
    for batch in (3, 8):
        x = torch.randn(batch, 3, 8, 8)
        assert torch.equal(exported(x), quantizer(x))
        x[0, 0, 0, 0] = torch.nan
        assert not quantizer(x).isfinite().all()


def test_lsq_plus_offset_gradient_and_first_range() -> None:
    quantizer = LSQPlus(2)
    x = torch.tensor([-0.6, 0.4, 1.4, 2.4])
    quantizer(x)
    assert quantizer.offset.item() == pytest.approx(-0.6)
    assert quantizer.step.item() == pytest.approx(1.0)
    _, grads = gradients(quantizer, torch.tensor([-5.0, 0.0, 9.0]))
    assert grads["offset"].item() == pytest.approx(2 / math.sqrt(3 * 3), rel=1e-5)


def test_pact_gradients() -> None:
    quantizer = PACT(2, clip_init=1.5)
    x = torch.tensor([-1.0, 0.4, 1.2, 1.5, 7.0])
    grad_x, grads = gradients(quantizer, x)
    assert grad_x.tolist() == [0, 1, 1, 0, 0]
    assert grads["clip"].item() == pytest.approx(2)
    assert torch.allclose(quantizer(x), torch.tensor([0, 0.5, 1.0, 1.5, 1.5]))


def test_dorefa_values() -> None:
    x = torch.tensor([-1.0, 0.2, 0.6, 3.0])
    assert torch.allclose(DoReFa(2)(x), torch.tensor([0, 1 / 3, 2 / 3, 1]))
    weight = torch.tensor([[-2.0, -0.1, 0.1, 1.0]])
    unit = torch.tanh(weight) / (2 * torch.tanh(torch.tensor(2.0))) + 0.5
    assert torch.allclose(DoReFaWeight(2)(weight), 2 * torch.round(unit * 3) / 3 - 1)
    assert DoReFaWeight(2)(torch.zeros(2, 2)).abs().sum() == 0


def test_apot_levels_are_the_papers() -> None:
    # 4 bits: sums of {0, 1, 1/4, 1/16} and {0, 1/2, 1/8, 1/32}, over 3/2.
    first, second = [0, 1, 1 / 4, 1 / 16], [0, 1 / 2, 1 / 8, 1 / 32]
    expected = sorted((a + b) / 1.5 for a in first for b in second)
    assert apot_magnitudes(4) == pytest.approx(expected)
    assert apot_magnitudes(2) == pytest.approx([0, 1 / 4, 1 / 2, 1])
    # 3 bits: sums of {0, 1, 1/2, 1/8} and {0, 1/4}.
    assert apot_magnitudes(3) == pytest.approx(
        [v / 1.25 for v in (0, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1, 1.25)]
    )
    assert APoTWeight(3).levels.tolist() == pytest.approx([-1, -0.5, -0.25, 0, 0.25, 0.5, 1])


@pytest.mark.parametrize("bits", range(2, 9))
def test_apot_levels_are_distinct(bits: int) -> None:
    magnitudes = apot_magnitudes(bits)
    assert len(set(magnitudes)) == 2**bits
    assert magnitudes[0] == 0
    assert magnitudes[-1] == 1


def test_apot_clip_gradient() -> None:
    quantizer = APoT(2, clip_init=2.0)
    grad_x, grads = gradients(quantizer, torch.tensor([-1.0, 0.6, 9.0]))  # 0.6 / 2 = 0.3, level 0.25
    assert grad_x.tolist() == [0, 1, 0]
    assert grads["clip"].item() == pytest.approx(1 + (0.25 - 0.3))


def test_learnable_thresholds_move_and_fixed_ones_do_not() -> None:
    x = torch.randn(500)
    for quantizer, moves in ((LearnableThresholdQuantizer(2), True), (FixedThresholdQuantizer(2), False)):
        before = quantizer.thresholds()
        optimizer = torch.optim.SGD([p for p in quantizer.parameters() if p.requires_grad], lr=1e-4)
        (quantizer(x) - 1.5).square().sum().backward()
        optimizer.step()
        assert torch.equal(quantizer.thresholds(), before) is not moves
    assert torch.allclose(before, torch.tensor([1 / 3, 1.0, 5 / 3]))


def test_ramp_acts_in_training_only() -> None:
    quantizer = LearnableThresholdQuantizer(2)
    quantizer.ramp = 1.0
    x = torch.linspace(0.1, 1.9, 50)
    assert len(quantizer(x).unique()) == 50
    assert len(quantizer.eval()(x).unique()) == 4


def test_levels_are_the_values_of_the_codes() -> None:
    quantizer = LearnableThresholdQuantizer(3)
    with torch.no_grad():
        quantizer.scale_out.fill_(0.3)
    x = torch.randn(300)
    assert torch.equal(quantizer.levels()[quantizer.codes(x).long()], quantizer(x))


@pytest.mark.parametrize("name", ["lsq", "lsq_plus"])
def test_first_values_come_once_from_training_data_and_survive_a_checkpoint(name: str) -> None:
    quantizer = activation_quantizer(name, 2)
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    quantizer.eval()(torch.randn(50) * 9)
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())
    quantizer.train()(torch.rand(50))
    first = quantizer.step.clone()
    quantizer(torch.rand(50) * 9)
    assert torch.equal(quantizer.step, first)
    other = activation_quantizer(name, 2)
    other.load_state_dict(quantizer.state_dict())
    other(torch.rand(50) * 9)
    assert torch.equal(other.step, first)


def test_quantizer_parameters_are_found_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), activation_quantizer("n2uq", 2), weight_quantizer("lsq", 2))
    assert [n for n, _ in quantizer_parameters(model)] == [
        "1.start",
        "1.widths",
        "1.scale_in",
        "1.scale_out",
        "2.step",
    ]


@pytest.mark.parametrize("bits", [0, 1, 9, -1, 2.0, True, "2"])
@pytest.mark.parametrize("build", [activation_quantizer, weight_quantizer])
def test_impossible_bits_are_named(build: object, bits: object) -> None:
    with pytest.raises(ValueError, match=rf"_bits: got {bits!r}, allowed is 2 to 8"):
        build("n2uq", bits)


def test_unknown_names_list_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="activation_quantizer: got 'lqs', allowed are n2uq, "):
        activation_quantizer("lqs", 2)
    with pytest.raises(ValueError, match="weight_quantizer: got 'pact', allowed are n2uq, "):
        weight_quantizer("pact", 2)
    with pytest.raises(ValueError, match="weight_bits: got 2, allowed is 32 with weight_quantizer 'float'"):
        weight_quantizer("float", 2)
    with pytest.raises(ValueError, match="clip_init: got 0"):
        PACT(2, clip_init=0)


def test_full_precision_passes_values_through() -> None:
    x = torch.randn(5)
    assert activation_quantizer("float", 32)(x) is x
    assert set(quantizers.__all__) <= set(dir(quantizers))


def test_pact_gradient_of_the_published_code() -> None:
    paper, published = PACT(2, clip_init=1.5), PACT(2, clip_init=1.5, gradient="published")
    x = torch.tensor([-1.0, 0.4, 1.2, 1.5, 7.0])
    assert torch.equal(paper(x), published(x))
    grad_x, grads = gradients(published, x)
    assert grad_x.tolist() == [0, 1, 1, 0, 0]
    assert grads["clip"].item() == pytest.approx(2 + (0 + 1 / 3 + 2 / 3 + 1 + 1))
    with pytest.raises(ValueError, match="gradient: got 'exact', allowed are "):
        PACT(2, gradient="exact")


@pytest.mark.parametrize("shift", [-2.0, 0.0, 2.0])
def test_lsq_plus_weights_start_with_a_step_of_three_deviations(shift: float) -> None:
    weight = torch.randn(50_000) + shift
    quantizer = LSQPlus(3, signed=True)
    quantizer(weight)
    mean, std = weight.mean().item(), weight.std(correction=0).item()
    assert quantizer.step.item() == pytest.approx((abs(mean) + 3 * std) / 4, rel=1e-5)
    assert quantizer.offset is None
