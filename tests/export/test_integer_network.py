import numpy as np
import pytest
import torch
from torch import nn

from lightning_n2uq.backbones.mobilenet_v2 import InvertedResidual
from lightning_n2uq.export import Description, ExactNetwork, describe
from lightning_n2uq.export.ir.steps import Codes, Input, IntConv
from lightning_n2uq.export.runtime.integer_network import IntegerNetwork, takes_bytes
from lightning_n2uq.export.verify.sweep import sweep_values
from lightning_n2uq.layers import QuantSpec


def images(count=5, channels=2, size=16):
    return torch.from_numpy(
        np.random.default_rng(0).standard_normal((count, channels, size, size)).astype(np.float32)
    )


def assert_same_bits(description, x):
    expected = ExactNetwork(description).run(x)
    assert torch.equal(IntegerNetwork(description)(x)[0], expected[description.output])
    logits, *codes = IntegerNetwork(description, code_outputs=True)(x)
    assert torch.equal(logits, expected[description.output])
    for step, values in zip(description.quantizers(), codes, strict=True):
        assert torch.equal(values, expected[step.name]), step.name


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("imagenet_stem", [True, False])
def test_the_bits_are_those_of_the_exact_network(small_network, bits, imagenet_stem):
    model = small_network(bits, bits, imagenet_stem=imagenet_stem)
    assert_same_bits(describe(model, (2, 32, 32)), images(size=32))


@pytest.mark.parametrize("activation", ["lsq", "lsq_plus", "pact", "dorefa"])
def test_baseline_quantizers(small_network, activation):
    assert_same_bits(describe(small_network(4, 4, "lsq", activation), (2, 16, 16)), images())


def test_depthwise_and_explicit_operations(perturb, small_network):
    blocks = [InvertedResidual(QuantSpec(4, 4), 4, 4, 2, 1), InvertedResidual(QuantSpec(4, 4), 4, 6, 3, 2)]
    model = nn.Sequential(nn.Conv2d(2, 4, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    assert_same_bits(describe(perturb(model), (2, 16, 16)), images())
    assert_same_bits(describe(small_network(negative_slopes=True), (2, 16, 16)), images())


def test_layers_run_on_bytes_where_no_pair_of_products_saturates(small_network):
    torch.ops.onednn.qconv_prepack  # noqa: B018 -- this torch has oneDNN's operators
    for bits, expected in ((2, True), (7, True), (8, False)):
        steps = describe(small_network(bits, bits), (2, 16, 16)).steps
        assert {takes_bytes(step) for step in steps if isinstance(step, IntConv)} == {expected}


def test_without_the_operators_integers_are_summed_in_float32(small_network, monkeypatch):
    monkeypatch.setattr("lightning_n2uq.export.runtime.integer_network.integer_operators", lambda: None)
    description = describe(small_network(), (2, 16, 16))
    assert not any(takes_bytes(step) for step in description.steps if isinstance(step, IntConv))
    assert_same_bits(description, images())


@pytest.mark.parametrize("bits", [2, 4, 5])
def test_codes_at_thresholds_their_neighbours_infinities_and_nan(small_network, bits):
    for step in describe(small_network(bits, bits), (2, 16, 16)).quantizers():
        assert isinstance(step, Codes)
        values = sweep_values(step, 2000)
        alone = Codes(step.name, ("x",), step.thresholds, step.sign)
        network = Description((Input("x", (), values.shape[1:], str(values.dtype)), alone))
        (codes,) = IntegerNetwork(network)(torch.from_numpy(values))
        assert torch.equal(codes, ExactNetwork(network)(torch.from_numpy(values)))


def test_only_what_a_strided_pointwise_layer_reads_is_quantized(small_network):
    description = describe(small_network(), (2, 16, 16))
    assert IntegerNetwork(description).thinned == {"layer2.0.downsample.0.codes": (2, 2)}
    assert not IntegerNetwork(description, code_outputs=True).thinned
