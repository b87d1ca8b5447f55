import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_n2uq import backbones
from lightning_n2uq.backbones.blocks import Bottleneck
from lightning_n2uq.backbones.mobilenet_v2 import InvertedResidual
from lightning_n2uq.convert import quantize_model
from lightning_n2uq.export import (
    ExactNetwork,
    FastNetwork,
    describe,
    load_safetensors,
    save_safetensors,
    with_normalization,
)
from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.runtime.fast import plan as plans
from lightning_n2uq.export.runtime.fast.layers import IntegerSums
from lightning_n2uq.export.verify.sweep import sweep
from lightning_n2uq.layers import QuantConv2d, QuantSpec


def images(count=3, channels=2, size=16, seed=0):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def assert_same_bits(description, x):
    """Compares every code and every logit with the plain integer engine's; returns the network."""
    fast = FastNetwork(description)
    expected, found = ExactNetwork(description).run(x), fast.run(x)
    assert set(found) == {step.name for step in description.quantizers()} | {description.output}
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        np.testing.assert_array_equal(value.numpy(), expected[name].numpy(), err_msg=name)
    return fast


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_bit_width_has_the_bits_of_the_plain_engine(small_network, bits):
    assert_same_bits(describe(small_network(bits, bits), (2, 16, 16)), images())


@pytest.mark.parametrize("activation", ["n2uq", "lsq", "lsq_plus", "pact", "dorefa", "n2uq_fixed"])
@pytest.mark.parametrize("weight", ["n2uq", "lsq", "dorefa"])
def test_every_quantizer_has_the_bits_of_the_plain_engine(small_network, weight, activation):
    assert_same_bits(describe(small_network(4, 4, weight, activation), (2, 16, 16)), images())


@pytest.mark.parametrize(
    "options",
    [
        {"quantize_downsample": False},
        {"imagenet_stem": True},
        {"negative_slopes": True},
        {"block": Bottleneck},
        {"in_channels": 5, "imagenet_stem": True},
        {"width": 7},
    ],
)
def test_every_kind_of_network_has_the_bits_of_the_plain_engine(small_network, options):
    model = small_network(**options)
    assert_same_bits(
        describe(model, (options.get("in_channels", 2), 32, 32)), images(2, options.get("in_channels", 2), 32)
    )


@pytest.mark.parametrize("method", ["n2uq", "lsq", "dorefa"])
@pytest.mark.parametrize("bits", [2, 4])
def test_resnet20(perturb, method, bits):
    torch.manual_seed(0)
    activation = {"dorefa": "pact"}.get(method, method)
    model = backbones.resnet20(bits, bits, method, activation, width=8)
    model.train()(images(4, 3, 16))
    assert_same_bits(describe(perturb(model), (3, 16, 16)), images(2, 3, 16))


def test_inverted_residuals(perturb):
    torch.manual_seed(1)
    spec = QuantSpec(4, 4)
    blocks = [InvertedResidual(spec, 4, 4, 2, 1), InvertedResidual(spec, 4, 6, 3, 2)]
    model = nn.Sequential(nn.Conv2d(2, 4, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    assert_same_bits(describe(perturb(model), (2, 16, 16)), images())


class Mixed(nn.Module):
    """Gates, branches, dilation, sums of two float convolutions, several kinds of pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.same = nn.Conv2d(8, 8, (5, 3), padding="same", dilation=(1, 2))
        self.even = nn.Conv2d(8, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.wide = nn.Conv2d(16, 8, 1)
        self.last = nn.Linear(8 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        y = nn.functional.relu6(self.depthwise(x))
        y = y * self.squeeze(y) + x
        y = torch.cat([nn.functional.leaky_relu(self.same(y), 0.1), self.even(y) * 0.5], 1)
        y = self.wide(y) + self.left(x) + self.right(x)
        return self.last(torch.flatten(y, 1))


@pytest.mark.parametrize(
    ("weight", "activation"), [("n2uq", "n2uq"), ("lsq", "lsq_plus"), ("float", "float")]
)
def test_a_converted_network_has_the_bits_of_the_plain_engine(weight, activation):
    torch.manual_seed(0)
    model = Mixed().eval()
    if weight != "float":
        policy = {"weight_quantizer": weight, "activation_quantizer": activation}
        quantize_model(model, {**policy, "weight_bits": 4, "activation_bits": 4}, [images(8, 3)])
    assert_same_bits(describe(model.eval(), (3, 16, 16)), images(3, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38, 1e-44, 0.0])
def test_odd_pixels_have_the_bits_of_the_plain_engine(small_network, value):
    x = images(3, 2, 32)
    x[1, 0, 3, 4] = value
    x[2] = value
    assert_same_bits(describe(small_network(imagenet_stem=True), (2, 32, 32)), x)
    assert_same_bits(describe(small_network(4, 4, "dorefa", "pact"), (2, 32, 32)), x)


def test_results_do_not_depend_on_batch_size_threads_or_memory_layout(small_network):
    network = FastNetwork(describe(small_network(4, 4, width=16), (2, 64, 64)))
    x = images(5, 2, 64)
    expected = network(x)
    for part in (1, 2, 3):
        assert torch.equal(torch.cat([network(piece) for piece in x.split(part)]), expected)
    assert torch.equal(network(x.to(memory_format=torch.channels_last)), expected)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(network(x), expected)
    finally:
        torch.set_num_threads(threads)


def test_pixels_are_normalized_inside(small_network):
    description = with_normalization(describe(small_network(), (2, 16, 16)), (0.4, 0.5), (0.2, 0.3))
    pixels = torch.randint(0, 256, (3, 2, 16, 16), dtype=torch.uint8)
    assert_same_bits(description, pixels)


def test_a_file_runs(small_network, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed (extra 'export')")
    description = describe(small_network(), (2, 16, 16))
    save_safetensors(description, tmp_path / "net.safetensors")
    expected = ExactNetwork(description)(images())
    assert torch.equal(FastNetwork(load_safetensors(tmp_path / "net.safetensors"))(images()), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_every_quantizer_is_swept(small_network, bits):
    for activation in ("n2uq", "lsq"):
        for step in describe(small_network(bits, bits, "n2uq", activation), (2, 16, 16)).quantizers():
            assert sweep(step, 3000, ("torch", "fast"))["fast"] == 0


def test_sums_that_float32_cannot_hold_run_as_in_the_plain_engine():
    torch.manual_seed(0)
    layers = [
        QuantConv2d(600, 2, 3, bias=False, spec=QuantSpec(8, 8)),
        QuantConv2d(2, 2, 1, spec=QuantSpec(8, 8)),
    ]
    description = describe(nn.Sequential(*layers).eval(), (600, 3, 3))
    assert description.wide_layers()
    fast = assert_same_bits(description, torch.full((1, 600, 3, 3), 9.0))
    assert "0" in fast.plan.alone


def test_a_program_without_enough_registers_runs_step_by_step(small_network, monkeypatch):
    description = describe(small_network(4, 4), (2, 16, 16))
    monkeypatch.setattr(plans.ProgramBuilder, "_free", too_large)
    fast = assert_same_bits(description, images())
    assert any("affine" in name for name in fast.plan.alone)


def too_large(self):
    raise plans.TooLargeError


def test_layers_run_as_integers_and_everything_between_two_of_them_as_one_pass(small_network):
    description = describe(small_network(), (2, 16, 16))
    plan = FastNetwork(description).plan
    assert set(plan.alone) == {"avgpool", "flatten", "fc"}
    layers = [step for step in description.steps if isinstance(step, s.IntConv)]
    # One pass in front of each quantized layer but for the shortcut, whose codes come with another's; one
    # before the average, one behind the last layer.
    assert len(plan.operations) == len(layers) + (len(layers) - 1) + 5


def test_saturating_products_take_the_float_path(monkeypatch):
    weight = np.full((1, 1, 1, 1), 127, np.int16)
    step = s.IntConv("conv", ("x",), weight, 8, False, 255)
    codes = torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)
    assert IntegerSums(step)(codes).item() == 127 * 255


def test_images_that_do_not_fit_are_refused(small_network):
    network = FastNetwork(describe(small_network(), (2, 16, 16)))
    with pytest.raises(ValueError, match=r"images: got .* allowed is float32 \[N, 2, 16, 16\]"):
        network(torch.zeros(1, 2, 8, 8))


def test_nothing_depends_on_autocast(small_network):
    network = FastNetwork(describe(small_network(imagenet_stem=True), (2, 32, 32)))
    x = images(2, 2, 32)
    expected = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(x), expected)


def test_a_description_of_one_step_runs():
    step = s.Codes("codes", ("x",), np.array([[-1.0, 0.0, 1.0]], np.float32))
    description = Description((s.Input("x", (), (2, 3, 3)), step))
    assert_same_bits(description, images(2, 2, 3))


@pytest.mark.parametrize("pads", [(0, 1, 2, 1), (1, 1, 1, 1), (0, 0, 0, 0)])
@pytest.mark.parametrize("groups", [1, 2])
def test_integer_layers_with_any_window(pads, groups):
    rng = np.random.default_rng(0)
    weight = (2 * rng.integers(0, 4, (4, 4 // groups, 3, 2)) - 3).astype(np.int16)
    step = s.IntConv("conv", ("codes",), weight, 2, True, 3, s.Window((2, 1), pads, (1, 2), groups))
    codes = s.Codes("codes", ("x",), np.array([[-1.0, 0.0, 1.0]], np.float32))
    steps = (s.Input("x", (), (4, 9, 8)), codes, step, s.Affine("y", ("conv",)))
    assert_same_bits(Description(steps), images(2, 4, 9)[:, :, :, :8])
